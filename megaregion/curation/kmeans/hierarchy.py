"""Hierarchical spherical k-means, in steps that a stage can do piece by piece and a process all at once.

A first level of cells is trained on a sample and every vector goes to its nearest cell. Each cell gets
centers by its size and finds them alone. That alone would cost half the quality, for a cell's border cuts
through clusters: so a few passes over all vectors follow, in which a vector may move to any center near its
own, wherever the cells' borders run.

Near centers bear near numbers. So a pass takes the vectors block by block of consecutive centers, and scores
all vectors of a block against the neighbours of all its centers: one matrix product over a few hundred
centers, where a full pass needs K.

Shapes: n vectors of C channels, G cells, K centers, M neighbours of a center, T centers that a piece's
vectors chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from megaregion.curation.kmeans.features import Vectors, evenly, in_chunks
from megaregion.curation.kmeans.kmeans import check_enough, find_centers, nearest, nearest_centers
from megaregion.curation.types import unit

SAMPLE = 256
"""Vectors that the first level sees for each of its cells."""
COARSE_ITERATIONS = 10
"""Passes over the sample; the cells only share out the work, so rough ones do."""
SIDES = (8, 32)
"""Fewest and most neighbours of a center, and centers of a block."""

WHOLE_PASSES, WHOLE_CENTERS = 5, 32_768
"""Passes that score every vector against every center, and the most centers for which that is worth its time.
It matters where near centers tell little: clusters without structure among them."""
SEARCHED = 1024
"""Centers whose neighbours are looked for at once."""
SHARES = 64
"""Parts of a pass inside one process; a fixed number, so that sums do not depend on the threads."""

NUDGE = 2.0**-10
"""How far, relative to each channel, the two halves of a split cluster start from each other."""
GATHER_ROWS = 65_536
"""Centers whose sums are in memory at once while pieces are added up."""

Labels = NDArray[np.int32]
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Plan:
    """The sizes of one hierarchical k-means."""

    clusters: int
    """Centers, K."""
    cells: int
    """First-level cells, G."""
    neighbours: int
    """Neighbours of each center, M, which also is the number of centers of a block."""
    passes: int
    """Passes over all vectors after the cells are done."""
    iterations: int
    """Passes of k-means inside a cell."""
    seed: int

    @classmethod
    def of(cls, clusters: int, iterations: int, seed: int, passes: int, cells: int = 0) -> Plan:
        """Fill in what follows from the number of centers; cells 0 takes its square root."""
        side = min(max(round((clusters / 4) ** 0.5), SIDES[0]), SIDES[1])
        cells = cells or max(1, round(clusters**0.5))
        return cls(clusters, cells, min(side, clusters), passes, iterations, seed)

    @property
    def whole(self) -> int:
        """The first passes, in which a vector may move to any center."""
        return min(self.passes, WHOLE_PASSES) if self.clusters <= WHOLE_CENTERS else 0

    def block(self, turn: int) -> int:
        """Consecutive centers whose vectors pass ``turn``, from 1, looks at together."""
        return self.clusters if turn <= self.whole else self.neighbours

    def near(self, turn: int, centers: Vectors, threads: int = 1) -> NDArray[np.int32]:
        """What the vectors of each center look at in pass ``turn``: [K, M], or all K centers, [1, K]."""
        if turn <= self.whole:
            return np.arange(self.clusters, dtype=np.int32)[None]
        parts = list(in_chunks(centers, SEARCHED))
        return np.concatenate(
            in_order(threads, lambda part: find_neighbours(part, centers, self.neighbours), parts)
        )


def find_cells(sample: Vectors, plan: Plan) -> Vectors:
    """Centers of the first level, [G, C], from a sample [s, C] of at least G vectors."""
    return find_centers(sample, plan.cells, COARSE_ITERATIONS, plan.seed).centers


def share_out(sizes: NDArray[np.int64], clusters: int) -> NDArray[np.int64]:
    """Centers of each cell by its size, int64 [G]: largest remainders, never more than the cell has vectors.

    Args:
        sizes: Vectors in each cell, int64 [G].
        clusters: Centers to share out, K.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    check_enough(int(sizes.sum()), clusters)
    exact = sizes * (clusters / sizes.sum())
    shares = np.minimum(np.floor(exact).astype(np.int64), sizes)
    while (lacking := clusters - int(shares.sum())) > 0:
        # A stable order, so that every piece that computes this comes to the same.
        order = np.argsort(-(exact - shares), kind="stable")
        open_cells = order[shares[order] < sizes[order]][:lacking]
        shares[open_cells] += 1
    return shares


def split_cell(vectors: Vectors, clusters: int, cell: int, plan: Plan) -> Vectors:
    """Centers of one cell alone, [clusters, C], from its vectors [n, C] or a sample of them."""
    if clusters == 0:
        return np.zeros((0, vectors.shape[1]), dtype=np.float32)
    return find_centers(vectors, clusters, plan.iterations, plan.seed + 1 + cell).centers


def label_cell(chunks: Iterable[Vectors], centers: Vectors, first: int) -> NDArray[np.int32]:
    """Number of the nearest center of a cell's vectors, int32 [n].

    Args:
        chunks: The cell's vectors, float32 [., C] each.
        centers: The cell's centers, [k, C].
        first: Number of the cell's first center in the whole run.
    """
    found = [nearest(chunk, centers, 1)[0][:, 0] + first for chunk in chunks]
    return np.concatenate([np.zeros(0, dtype=np.int32), *found]).astype(np.int32)


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


class Moved(NamedTuple):
    """The outcome of one piece of a pass."""

    labels: Labels
    """Center of each vector, int32 [n]."""
    sums: Sums


class Gathered(NamedTuple):
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
    """Add up the pieces of a pass, in their order, to the next centers; empty ones split large clusters."""
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


@dataclass
class Trace:
    """What a run of all steps in one process has seen."""

    centers: Vectors
    """Unit vectors, float32 [K, C]."""
    cosines: list[float] = field(default_factory=list)
    """Mean cosine of a vector to the center it had chosen, after each pass."""
    split: int = 0
    """Empty centers that took half of a large cluster."""


def cluster(
    vectors: Vectors, plan: Plan, threads: int, on_step: Callable[[str], None] = lambda name: None
) -> Trace:
    """Do all steps in this process; the outcome is a function of vectors and plan alone.

    Args:
        vectors: Unit vectors, float32 [n, C].
        plan: Sizes and seed.
        threads: Cells that are worked on at once.
        on_step: Called with the name of each step that is done.

    Raises:
        UserError: There are fewer vectors than centers.
    """
    check_enough(len(vectors), plan.clusters)
    cells = find_cells(vectors[evenly(len(vectors), SAMPLE * plan.cells)], plan)
    parts = in_order(threads, lambda part: nearest_centers(part, cells)[0], list(in_chunks(vectors, 8192)))
    cell_of = np.concatenate(parts)
    on_step("route")
    sizes = np.bincount(cell_of, minlength=plan.cells)
    shares = share_out(sizes, plan.clusters)
    members = np.split(np.argsort(cell_of, kind="stable"), np.cumsum(sizes)[:-1])
    first = np.cumsum(shares) - shares

    def split(cell: int) -> tuple[Vectors, NDArray[np.int32]]:
        own = vectors[members[cell]]
        centers = split_cell(own, int(shares[cell]), cell, plan)
        return centers, label_cell(in_chunks(own, len(own) or 1), centers, int(first[cell]))

    found = in_order(threads, split, range(plan.cells))
    labels = np.empty(len(vectors), dtype=np.int32)
    labels[np.concatenate(members)] = np.concatenate([each for _, each in found])
    trace = Trace(np.concatenate([centers for centers, _ in found]))
    on_step("split")
    for number in range(plan.passes):
        labels = _pass(number + 1, vectors, labels, plan, threads, trace)
        on_step(f"pass {number + 1}")
    return trace


def _pass(
    turn: int, vectors: Vectors, labels: NDArray[np.int32], plan: Plan, threads: int, trace: Trace
) -> NDArray[np.int32]:
    """One pass over all vectors, which are shared out by the block that their center lies in."""
    centers, block = trace.centers, plan.block(turn)
    near = plan.near(turn, centers, threads)
    order = np.argsort(labels, kind="stable")
    # A share ends where a block ends, or its matrix products would be done twice.
    edges = np.arange(1, SHARES) * plan.clusters // SHARES // plan.neighbours * plan.neighbours
    shares = np.split(order, np.searchsorted(labels[order], edges))
    moved = in_order(
        threads,
        lambda rows: refine([vectors[rows]], labels[rows], centers, near, block),
        shares,
    )
    outcome = gather(centers, [each.sums for each in moved])
    trace.centers = outcome.centers
    trace.split += outcome.split
    trace.cosines.append(sum(each.sums.cosine for each in moved) / len(vectors))
    new = np.empty_like(labels)
    new[order] = np.concatenate([each.labels for each in moved])
    return new


def in_order(threads: int, work: Callable[[Item], Outcome], items: Sequence[Item]) -> list[Outcome]:
    """Work on items in parallel; the outcomes keep the items' order, whatever the number of threads."""
    if threads <= 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))
