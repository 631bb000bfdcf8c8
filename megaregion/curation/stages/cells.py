"""The stages of k-means in first-level cells; none has a piece where --cluster-method makes it flat.

coarse finds the first level, route sorts every embedding into its cell, split finds each cell's own centers.
Then come the passes over all embeddings: gather-N adds up what the pieces before it left, to centers and the
neighbours of each; refine-N moves every embedding to the nearest of the centers around its own. Each pass has
a pair of them, so that it is made of independent pieces and a kill costs no more than one.

Shapes: n embeddings of a cell, r of a slice, G cells, K centers of the run, k of a cell, M neighbours of a
center, T centers that a cell's embeddings chose, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.kmeans.features import (
    Vectors,
    chunks,
    count_broken,
    evenly,
    in_chunks,
    pick,
    rows_in,
    to_unit,
)
from megaregion.curation.kmeans.hierarchy import (
    SAMPLE,
    Gathered,
    Plan,
    Sums,
    find_cells,
    gather,
    label_cell,
    refine,
    share_out,
    split_cell,
)
from megaregion.curation.kmeans.kmeans import check_enough, nearest
from megaregion.curation.settings import MAX_PASSES
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Stage, plain
from megaregion.curation.stages.store import Output, Piece, Store

CELLS, VECTORS, OFFSETS = "cells.npy", "vectors.npy", "offsets.npy"
CENTERS, LABELS, NEIGHBOURS = "centers.npy", "labels.npy", "neighbours.npy"
CHOSEN, SUMS, COUNTS, COSINE = "chosen.npy", "sums.npy", "counts.npy", "cosine.npy"


class ClusterStage(Stage):
    """A stage of hierarchical k-means."""

    @property
    def plan(self) -> Plan:
        """Sizes and seed."""
        settings = self.job.settings.cluster
        return Plan.of(
            settings.clusters,
            settings.cluster_iterations,
            settings.cluster_seed,
            settings.refine_passes,
            settings.first_level,
        )

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.job.settings.cluster.hierarchical

    @override
    def settings(self) -> dict[str, Any]:
        values = plain(self.job.settings.cluster)
        if self.active:
            # How many vectors a cell learns from, and in which order they add up.
            values["chunk_memory"] = self.job.settings.assign.chunk_memory
        return values

    def chunk_rows(self, channels: int) -> int:
        """Embeddings that may be worked on at once."""
        return rows_in(self.job.settings.assign.chunk_memory, channels)


class Coarse(ClusterStage):
    """Writes cells.npy, float32 [G, C], from a sample that is spread evenly over all pieces."""

    name = "coarse"
    whole = True

    @override
    def pieces(self) -> int:
        return int(self.active)

    @override
    def needs(self, number: int) -> list[Piece]:
        return self.every("embed")

    @override
    def work(self, number: int, output: Output) -> None:
        parts = [self.load(piece, FEATURES, mapped=True) for piece in self.needs(number)]
        total = sum(map(len, parts))
        check_enough(total, self.plan.clusters)
        # Room for rows without embedding, which are of no use here.
        sample = to_unit(pick(parts, evenly(total, 2 * SAMPLE * self.plan.cells)))
        sample = sample[sample.any(axis=1)]
        sample = sample[evenly(len(sample), SAMPLE * self.plan.cells)]
        output.save(CELLS, find_cells(sample, self.plan))
        output.tick()


class Route(ClusterStage):
    """Writes vectors.npy, float16 [r, C], sorted by cell, and offsets.npy, int64 [G + 1], where each begins.

    A cell's vectors then are one stretch of each piece, read in one go. Rows without embedding are left out.
    """

    name = "route"

    @override
    def pieces(self) -> int:
        return self.slices() if self.active else 0

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece("embed", number), Piece("coarse", 0)]

    @override
    def work(self, number: int, output: Output) -> None:
        features, coarse = self.needs(number)
        rows = self.load(features, FEATURES, mapped=True)
        cells = self.load(coarse, CELLS)
        labels = np.zeros(len(rows), dtype=np.int64)
        usable = np.zeros(len(rows), dtype=bool)
        size = self.chunk_rows(rows.shape[1])
        for start, chunk in zip(range(0, len(rows), size), in_chunks(rows, size), strict=True):
            vectors = to_unit(chunk)
            labels[start : start + size] = nearest(vectors, cells, 1)[0][:, 0]
            usable[start : start + size] = vectors.any(axis=1)
            output.counts["embeddings not finite"] += count_broken(chunk)
        order = np.flatnonzero(usable)
        order = order[np.argsort(labels[order], kind="stable")]
        output.save(VECTORS, np.asarray(rows)[order])
        output.save(OFFSETS, np.searchsorted(labels[order], np.arange(len(cells) + 1)).astype(np.int64))
        for _ in range(self.count(number)):
            output.tick()


class CellStage(ClusterStage):
    """A stage with one piece for each first-level cell."""

    @property
    @override
    def sliced(self) -> bool:
        return False

    @override
    def pieces(self) -> int:
        return self.plan.cells if self.active else 0

    @override
    def images(self, number: int) -> Sequence[ImageFile]:
        # A piece reads a cell, and knows its images through the pieces that it needs.
        return ()

    def routed(self) -> list[Piece]:
        """The pieces that hold all embeddings, sorted by cell."""
        return self.every("route")

    def cell(self, number: int) -> list[NDArray[np.float16]]:
        """The stretches of a cell in every piece, not read yet."""
        return [
            self.load(piece, VECTORS, mapped=True)[slice(*self.load(piece, OFFSETS)[number : number + 2])]
            for piece in self.routed()
        ]

    def cell_chunks(self, number: int) -> Iterator[Vectors]:
        """A cell's unit vectors, in parts that fit in memory."""
        parts = self.cell(number)
        return chunks(parts, self.chunk_rows(parts[0].shape[1]))

    def sizes(self) -> NDArray[np.int64]:
        """Embeddings in each cell, [G]."""
        return np.sum([np.diff(self.load(piece, OFFSETS)) for piece in self.routed()], axis=0, dtype=np.int64)


class Split(CellStage):
    """Writes centers.npy, float32 [k, C], and labels.npy, int32 [n], which counts centers over all cells.

    A cell that does not fit in memory is learned from an even sample of it; all of it is labelled.
    """

    name = "split"

    @override
    def needs(self, number: int) -> list[Piece]:
        return self.routed()

    @override
    def work(self, number: int, output: Output) -> None:
        shares = share_out(self.sizes(), self.plan.clusters)
        parts = self.cell(number)
        size, rows = self.sizes()[number], self.chunk_rows(parts[0].shape[1])
        share = int(shares[number])
        sample = to_unit(pick(parts, evenly(int(size), max(rows, share))))
        centers = split_cell(sample, share, number, self.plan)
        output.save(CENTERS, centers)
        output.save(LABELS, label_cell(self.cell_chunks(number), centers, int(shares[:number].sum())))
        output.tick()


class Gather(ClusterStage):
    """Writes centers.npy, float32 [K, C], and neighbours.npy, int32 [K, M], or [1, K] where all are."""

    whole = True
    turn = 1

    @override
    def pieces(self) -> int:
        return int(self.active and self.turn <= self.plan.passes)

    @override
    def needs(self, number: int) -> list[Piece]:
        return before(self.turn, self.plan.cells)

    @override
    def work(self, number: int, output: Output) -> None:
        centers, split = gathered(self.turn, self.plan.cells, self.job.store)
        output.counts[f"clusters split in pass {self.turn - 1}"] += split
        output.save(CENTERS, centers)
        output.save(NEIGHBOURS, self.plan.near(self.turn, centers))
        output.tick()


class Refine(CellStage):
    """Writes labels.npy, int32 [n], and what a cell's embeddings add to centers: see hierarchy.Sums."""

    turn = 1

    @override
    def pieces(self) -> int:
        return self.plan.cells if self.active and self.turn <= self.plan.passes else 0

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece(_before(self.turn), number), Piece(f"gather-{self.turn}", 0), *self.routed()]

    @override
    def work(self, number: int, output: Output) -> None:
        last, gathered_before = self.needs(number)[:2]
        # Only the rows that are touched are read: those around this cell's.
        centers = self.load(gathered_before, CENTERS, mapped=True)
        near = self.load(gathered_before, NEIGHBOURS)
        labels = self.load(last, LABELS)
        moved = refine(self.cell_chunks(number), labels, centers, near, self.plan.block(self.turn))
        sums = moved.sums
        for name, values in (
            (LABELS, moved.labels), (CHOSEN, sums.centers), (SUMS, sums.sums), (COUNTS, sums.counts),
            (COSINE, np.array(sums.cosine)),
        ):  # fmt: skip
            output.save(name, values)
        output.tick()


def before(turn: int, cells: int) -> list[Piece]:
    """The pieces that hold the centers from which a pass starts: one a cell, then those they refine."""
    pieces = [Piece(_before(turn), cell) for cell in range(cells)]
    return pieces if turn == 1 else [*pieces, Piece(f"gather-{turn - 1}", 0)]


def gathered(turn: int, cells: int, store: Store) -> Gathered:
    """Add up what the pieces before pass ``turn``, counted from 1, left; ``cells`` is G."""
    pieces = before(turn, cells)[:cells]
    if turn == 1:
        return Gathered(np.concatenate([store.load(piece, CENTERS) for piece in pieces]), 0)
    sums = [
        Sums(
            store.load(piece, CHOSEN),
            store.load(piece, SUMS, mapped=True),
            store.load(piece, COUNTS),
            float(store.load(piece, COSINE)),
        )
        for piece in pieces
    ]
    return gather(store.load(Piece(f"gather-{turn - 1}", 0), CENTERS), sums)


def _before(turn: int) -> str:
    return "split" if turn == 1 else f"refine-{turn - 1}"


def _make_passes() -> Sequence[type[Stage]]:
    made: list[type[Stage]] = []
    for turn in range(1, MAX_PASSES + 1):
        for kind in (Gather, Refine):
            name = f"{kind.__name__.lower()}-{turn}"
            made.append(type(f"{kind.__name__}{turn}", (kind,), {"name": name, "turn": turn}))
    return made


PASSES = tuple(_make_passes())
"""Both stages of every pass that settings allow, in order; those beyond refine_passes have no pieces."""
