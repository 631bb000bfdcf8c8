"""Spherical k-means and nearest centers; the only file that imports faiss.

Faiss works on a GPU where it sees one, else on one thread of this process: more of them add up in another
order, and centers would differ by machine. Callers put whole problems on threads of their own.

Shapes: n embeddings and K centers of C channels.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError

Vectors = NDArray[np.float32]

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
    """Label every vector with its nearest center.

    Args:
        vectors: Unit vectors, float32 [n, C].
        centers: Unit vectors, float32 [K, C].

    Returns:
        Labels, int64 [n], and cosines to the chosen centers, float32 [n].
    """
    labels, cosines = nearest(vectors, centers, 1)
    return labels[:, 0], cosines[:, 0]


def nearest(
    vectors: Vectors, centers: Vectors, count: int, threads: int = 1
) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest centers of every vector, nearest first.

    Args:
        vectors: Unit vectors, float32 [n, C].
        centers: Unit vectors, float32 [K, C].
        count: How many of them, at most K.
        threads: Faiss's own.

    Returns:
        Centers, int64 [n, count], and cosines to them, float32 [n, count].
    """
    if not len(vectors):
        return np.zeros((0, count), dtype=np.int64), np.zeros((0, count), dtype=np.float32)
    with _faiss(threads) as faiss:
        queries, base = np.ascontiguousarray(vectors), np.ascontiguousarray(centers)
        metric = faiss.METRIC_INNER_PRODUCT
        if faiss.get_num_gpus() and len(queries) * len(base) >= GPU_WORTH:
            cosines, labels = faiss.knn_gpu(_gpu(faiss), queries, base, count, metric=metric)
        else:
            cosines, labels = faiss.knn(queries, base, count, metric=metric)
    return labels.astype(np.int64), cosines


def check_enough(vectors: int, clusters: int) -> None:
    """Refuse more centers than vectors.

    Raises:
        UserError: There are fewer vectors than centers.
    """
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
