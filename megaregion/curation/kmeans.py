"""Spherical k-means and nearest centers; the only file that imports faiss.

Shapes: n embeddings and K centers of C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Clustering:
    """The outcome of k-means."""

    centers: Vectors
    """Unit vectors, float32 [K, C]."""
    objective: list[float]
    """Sum of squared distances to the nearest center after each pass."""


def find_centers(vectors: Vectors, clusters: int, iterations: int, seed: int) -> Clustering:
    """Cluster unit vectors by cosine; an empty cluster takes half of a large one.

    The outcome is a function of the arguments alone.

    Args:
        vectors: Unit vectors, float32 [n, C].
        clusters: Number of centers, K.
        iterations: Passes over the vectors.
        seed: Seed of the first centers.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    if len(vectors) < clusters:
        raise UserError(
            f"--clusters must be at most the {len(vectors)} regions that were embedded, got {clusters}; "
            "use fewer clusters or more images"
        )
    with _one_thread() as faiss:
        means = faiss.Kmeans(
            vectors.shape[1],
            clusters,
            niter=iterations,
            seed=seed,
            spherical=True,
            # Every vector counts; faiss would take a sample and warn about small clusters.
            min_points_per_centroid=1,
            max_points_per_centroid=len(vectors),
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
    if not len(vectors):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    with _one_thread() as faiss:
        index = faiss.IndexFlatIP(centers.shape[1])
        index.add(np.ascontiguousarray(centers))
        cosines, labels = index.search(np.ascontiguousarray(vectors), 1)
    return labels[:, 0].astype(np.int64), cosines[:, 0]


@contextlib.contextmanager
def _one_thread() -> Iterator[Any]:
    """Faiss on one thread: more of them add up in another order, and centers would differ by machine."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)
