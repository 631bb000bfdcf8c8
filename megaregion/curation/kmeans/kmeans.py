"""Spherical k-means and nearest centers; the only file that imports faiss.

Faiss works on a GPU where it sees one, else on one thread of this process: more of them add up in another
order, and centers would differ by machine. Callers put whole problems on threads of their own.

Shapes: n embeddings and K centers of C channels.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from megaregion.curation.kmeans.features import Vectors
from megaregion.errors import UserError

TILE = (1024, 4096)
"""Vectors and centers that are scored at once; the scores stay in the processor's cache."""
GPU_WORTH = 2**22
"""Fewest scores for which a search goes to the GPU: below, the way there takes longer than the search."""


@dataclass(frozen=True)
class Clustering:
    """The outcome of k-means."""

    centers: Vectors
    """Unit vectors, float32 [K, C]."""
    objective: list[float]
    """Sum of squared distances to the nearest center after each pass."""


def find_centers(vectors: Vectors, clusters: int, iterations: int, seed: int, threads: int = 1) -> Clustering:
    """Cluster unit vectors by cosine; an empty cluster takes half of a large one.

    The outcome is a function of the arguments alone.

    Args:
        vectors: Unit vectors, float32 [n, C].
        clusters: Number of centers, K.
        iterations: Passes over the vectors.
        seed: Seed of the first centers.
        threads: Faiss's own; another number may change the last bits of the centers.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    check_enough(len(vectors), clusters)
    with _faiss(threads) as faiss:
        means = faiss.Kmeans(
            vectors.shape[1],
            clusters,
            niter=iterations,
            seed=seed,
            spherical=True,
            # Every vector counts; faiss would take a sample and warn about small clusters.
            min_points_per_centroid=1,
            max_points_per_centroid=len(vectors),
            gpu=min(1, faiss.get_num_gpus()),
        )
        means.train(np.ascontiguousarray(vectors))
        centers = np.asarray(means.centroids, dtype=np.float32)
    return Clustering(centers, [float(value) for value in means.obj])


def nearest_centers(vectors: Vectors, centers: Vectors) -> tuple[NDArray[np.int64], Vectors]:
    """Label vectors [n, C] with the nearest of the centers [K, C], all of unit length.

    Returns:
        Labels, int64 [n], and cosines to the chosen centers, float32 [n].
    """
    labels, cosines = nearest(vectors, centers, 1)
    return labels[:, 0], cosines[:, 0]


def nearest(vectors: Vectors, centers: Vectors, count: int) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest centers of every vector, nearest first.

    On a processor the scores are numpy's products, four times as fast as faiss's own where there is AVX-512.

    Args:
        vectors: Unit vectors, float32 [n, C].
        centers: Unit vectors, float32 [K, C].
        count: How many of them, at most K.

    Returns:
        Centers, int64 [n, count], and cosines to them, float32 [n, count].
    """
    if not len(vectors):
        return np.zeros((0, count), dtype=np.int64), np.zeros((0, count), dtype=np.float32)
    queries, base = np.ascontiguousarray(vectors), np.ascontiguousarray(centers)
    with _faiss(1) as faiss:
        if faiss.get_num_gpus() and len(queries) * len(base) >= GPU_WORTH:
            metric = faiss.METRIC_INNER_PRODUCT
            cosines, labels = faiss.knn_gpu(_gpu(faiss), queries, base, count, metric=metric)
            return labels.astype(np.int64), cosines
    _multiply_on_one_thread()
    find = _best if count == 1 else functools.partial(_best_few, count=count)
    parts = [find(queries[row : row + TILE[0]], base) for row in range(0, len(queries), TILE[0])]
    return np.concatenate([labels for labels, _ in parts]), np.concatenate([cosines for _, cosines in parts])


def _best(vectors: Vectors, centers: Vectors) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest center of each vector; of equal scores the first wins, as in faiss.

    Two centers that are the same need not score the same: at the edges of its blocks, BLAS may add in another
    order, and which of the two wins then differs by processor.
    """
    rows = np.arange(len(vectors))
    labels = np.zeros(len(vectors), dtype=np.int64)
    cosines = np.full(len(vectors), -np.inf, dtype=np.float32)
    for first in range(0, len(centers), TILE[1]):
        scores = vectors @ centers[first : first + TILE[1]].T
        best = scores.argmax(axis=1)
        value = scores[rows, best]
        better = value > cosines
        labels[better], cosines[better] = best[better] + first, value[better]
    return labels[:, None], cosines[:, None]


def _best_few(vectors: Vectors, centers: Vectors, count: int) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest ``count`` centers of each vector."""
    labels, cosines = np.zeros((len(vectors), 0), dtype=np.int64), np.zeros((len(vectors), 0), np.float32)
    for first in range(0, len(centers), TILE[1]):
        scores = vectors @ centers[first : first + TILE[1]].T
        places = _greatest(scores, count)
        labels = np.concatenate([labels, places + first], axis=1)
        cosines = np.concatenate([cosines, np.take_along_axis(scores, places, axis=1)], axis=1)
        kept = _greatest(cosines, count)
        labels, cosines = np.take_along_axis(labels, kept, axis=1), np.take_along_axis(cosines, kept, axis=1)
    order = np.argsort(-cosines, axis=1, kind="stable")
    return np.take_along_axis(labels, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def _greatest(scores: Vectors, count: int) -> NDArray[np.int64]:
    """Places of the greatest ``count`` scores of each row, in their own order."""
    spare = scores.shape[1] - count
    if spare <= 0:
        return np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return np.sort(np.argpartition(scores, spare, axis=1)[:, spare:], axis=1)


@functools.cache
def _multiply_on_one_thread() -> None:
    """Keep numpy's products on the calling thread, for the rest of the process."""
    threadpool_limits(limits=1, user_api="blas")


def check_enough(vectors: int, clusters: int) -> None:
    """Refuse more centers than vectors.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    if not vectors:
        raise UserError(
            "no image has a region that can be embedded; loosen --min-edge, --max-area or --min-objectness"
        )
    if vectors < clusters:
        raise UserError(
            f"--clusters must be at most the {vectors} regions that were embedded, got {clusters}; "
            "use fewer clusters or more images"
        )


def _gpu(faiss: Any) -> Any:
    """This process's room on the GPU, made once."""
    key = os.getpid()
    if key not in _ROOMS:
        _ROOMS[key] = faiss.StandardGpuResources()
    return _ROOMS[key]


_ROOMS: dict[int, Any] = {}


@contextlib.contextmanager
def _faiss(threads: int) -> Iterator[Any]:
    """Faiss on so many threads; the setting is the calling thread's, others keep theirs."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
