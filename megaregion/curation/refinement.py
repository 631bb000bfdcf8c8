"""One pass of k-means over all vectors in which each looks at the centers near its own, not at all K.

Near centers bear near numbers. So vectors are taken block by block of consecutive centers, and all vectors
of a block are scored against the neighbours of all its centers: one matrix product over a few hundred
centers, where a full pass needs K.

Shapes: n vectors of C channels, K centers, M neighbours of a center, T centers that a piece's vectors chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from megaregion.curation.embedder import unit
from megaregion.curation.kmeans import Vectors, nearest

Labels = NDArray[np.int32]

NUDGE = 2.0**-10
"""How far, relative to each channel, the two halves of a split cluster start from each other."""
GATHER_ROWS = 65_536
"""Centers whose sums are in memory at once while pieces are added up."""


@dataclass(frozen=True)
class Sums:
    """What one piece's vectors add to the centers that they chose."""

    centers: NDArray[np.int64]
    """Numbers of the centers, rising, [T]."""
    sums: Vectors
    """Sum of the vectors of each, float32 [T, C]."""
    counts: NDArray[np.int64]
    """Vectors of each, [T]."""
    cosine: float
    """Sum over the vectors of the cosine to the center that was chosen."""


@dataclass(frozen=True)
class Moved:
    """The outcome of one piece of a pass."""

    labels: Labels
    """Center of each vector, int32 [n]."""
    sums: Sums


@dataclass(frozen=True)
class Gathered:
    """The centers after a pass."""

    centers: Vectors
    """Unit vectors, float32 [K, C]."""
    split: int
    """Centers that had no vector and took half of a large cluster."""


def find_neighbours(part: Vectors, centers: Vectors, count: int) -> Labels:
    """The nearest centers [p, M] of some centers [p, C] among all centers [K, C], themselves included."""
    return nearest(part, centers, count)[0].astype(np.int32)


def climb(
    vectors: Vectors, labels: NDArray[np.integer], centers: Vectors, neighbours: Labels, block: int
) -> tuple[NDArray[np.int64], Vectors]:
    """Move every vector to the nearest of the centers around its own.

    Args:
        vectors: Unit vectors, float32 [n, C].
        labels: Center of each vector so far, [n].
        centers: Unit vectors, float32 [K, C].
        neighbours: Centers near each center, [K, M].
        block: Consecutive centers whose vectors and neighbours are looked at together.

    Returns:
        New labels, int64 [n], and cosines to them, float32 [n].
    """
    order = np.argsort(labels, kind="stable")
    blocks = labels[order] // block
    bounds = np.flatnonzero(np.diff(blocks, prepend=-1, append=-1)).tolist()
    found, cosines = np.zeros(len(vectors), dtype=np.int64), np.zeros(len(vectors), dtype=np.float32)
    for start, stop in itertools.pairwise(bounds):
        rows, first = order[start:stop], int(blocks[start]) * block
        candidates = np.unique(neighbours[first : first + block])
        places, scores = nearest(vectors[rows], centers[candidates], 1)
        found[rows], cosines[rows] = candidates[places[:, 0]], scores[:, 0]
    return found, cosines


def refine(
    chunks: Iterable[Vectors], labels: Labels, centers: Vectors, neighbours: Labels, block: int
) -> Moved:
    """One piece of a pass: move its vectors, and add them up for the centers they chose.

    Args:
        chunks: The piece's vectors, in parts that fit in memory, float32 [., C] each.
        labels: Center of each so far, int32 [n].
        centers: Unit vectors, float32 [K, C].
        neighbours: Centers near each center, [K, M].
        block: Consecutive centers that are looked at together.
    """
    new, total = [np.zeros(0, dtype=np.int32)], _nothing(centers.shape[1])
    start = 0
    for chunk in chunks:
        moved, cosines = climb(chunk, labels[start : start + len(chunk)], centers, neighbours, block)
        start += len(chunk)
        new.append(moved.astype(np.int32))
        total = _add(total, _sum(chunk, moved, float(cosines.sum(dtype=np.float64))))
    return Moved(np.concatenate(new), total)


def gather(centers: Vectors, pieces: Sequence[Sums]) -> Gathered:
    """Add up the pieces of a pass, in their order, to the next centers; empty ones split large clusters.

    Args:
        centers: The centers so far, float32 [K, C].
        pieces: What each piece's vectors add.
    """
    found = np.empty_like(centers)
    counts = np.zeros(len(centers), dtype=np.int64)
    for start in range(0, len(centers), GATHER_ROWS):
        stop = min(start + GATHER_ROWS, len(centers))
        sums = np.zeros((stop - start, centers.shape[1]))
        for piece in pieces:
            low, high = np.searchsorted(piece.centers, [start, stop])
            rows = piece.centers[low:high]
            sums[rows - start] += piece.sums[low:high]
            counts[rows] += piece.counts[low:high]
        found[start:stop] = unit(sums.astype(np.float32))
    # Vectors that cancel out leave no direction; the center stays where it was.
    lost = ~found.any(axis=1)
    found[lost] = centers[lost]
    return Gathered(found, split_large(found, counts))


def split_large(centers: Vectors, counts: NDArray[np.int64]) -> int:
    """Give each empty center half of the largest cluster that is left, in place.

    Args:
        centers: Unit vectors, float32 [K, C]; those without vectors are moved.
        counts: Vectors of each, int64 [K].

    Returns:
        How many were empty.
    """
    empty = np.flatnonzero(counts == 0)
    large = np.argsort(-counts, kind="stable")[: len(empty)]
    large = large[counts[large] > 1]
    taken = empty[: len(large)]
    nudge = np.where(np.arange(centers.shape[1]) % 2, NUDGE, -NUDGE).astype(np.float32)
    original = centers[large]
    centers[taken], centers[large] = unit(original * (1 + nudge)), unit(original * (1 - nudge))
    return len(taken)


def _sum(vectors: Vectors, labels: NDArray[np.int64], cosine: float) -> Sums:
    chosen, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(places, kind="stable")
    ends = np.concatenate([[0], np.cumsum(counts)])
    members = csr_matrix((np.ones(len(labels), np.float32), order, ends), (len(chosen), len(labels)))
    return Sums(chosen, np.asarray(members @ vectors), counts, cosine)


def _add(one: Sums, other: Sums) -> Sums:
    if not len(one.centers):
        return other
    chosen = np.union1d(one.centers, other.centers)
    sums = np.zeros((len(chosen), one.sums.shape[1]), dtype=np.float32)
    counts = np.zeros(len(chosen), dtype=np.int64)
    for each in (one, other):
        rows = np.searchsorted(chosen, each.centers)
        sums[rows] += each.sums
        counts[rows] += each.counts
    return Sums(chosen, sums, counts, one.cosine + other.cosine)


def _nothing(channels: int) -> Sums:
    return Sums(np.zeros(0, np.int64), np.zeros((0, channels), np.float32), np.zeros(0, np.int64), 0.0)
