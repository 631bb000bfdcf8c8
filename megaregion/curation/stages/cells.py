"""Stages coarse and route: the first level of k-means, and every embedding in its cell.

Both have no piece where --cluster-method makes k-means flat.

Shapes: n embeddings of the run, r of a piece, G cells, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.inputs.source import ImageFile
from megaregion.curation.kmeans.features import chunks, count_broken, open_rows, rows_in, to_unit
from megaregion.curation.kmeans.hierarchy import (
    SAMPLE,
    Gathered,
    Plan,
    Sums,
    evenly,
    find_cells,
    gather,
    in_chunks,
    label_cell,
    refine,
    share_out,
    split_cell,
)
from megaregion.curation.kmeans.kmeans import Vectors, check_enough, nearest
from megaregion.curation.settings import MAX_PASSES
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Stage, plain
from megaregion.curation.stages.store import Output, Piece

CELLS, VECTORS, OFFSETS = "cells.npy", "vectors.npy", "offsets.npy"


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
        return [Piece("embed", piece) for piece in range(self.slices())]

    @override
    def work(self, number: int, output: Output) -> None:
        files = [open_rows(self.path(piece, FEATURES)) for piece in self.needs(number)]
        ends = np.cumsum([len(rows) for rows in files])
        check_enough(int(ends[-1]), self.plan.clusters)
        # Room for rows without embedding, which are of no use here.
        places = evenly(int(ends[-1]), 2 * SAMPLE * self.plan.cells)
        split = np.split(places, np.searchsorted(places, ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        parts = [rows[own - start] for rows, own, start in zip(files, split, starts, strict=True)]
        sample = to_unit(np.concatenate(parts))
        sample = sample[sample.any(axis=1)]
        sample = sample[evenly(len(sample), SAMPLE * self.plan.cells)]
        with output.file(CELLS) as file:
            np.save(file, find_cells(sample, self.plan), allow_pickle=False)
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
        rows = open_rows(self.path(features, FEATURES))
        cells = np.load(self.path(coarse, CELLS), allow_pickle=False)
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
        with output.file(VECTORS) as file:
            np.save(file, np.asarray(rows)[order], allow_pickle=False)
        with output.file(OFFSETS) as file:
            offsets = np.searchsorted(labels[order], np.arange(len(cells) + 1))
            np.save(file, offsets.astype(np.int64), allow_pickle=False)
        for _ in self.images(number):
            output.tick()


CENTERS, LABELS = "centers.npy", "labels.npy"


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
        return [Piece("route", piece) for piece in range(self.slices())]

    def cell(self, number: int) -> list[NDArray[np.float16]]:
        """The stretches of a cell in every piece, not read yet."""
        return [
            open_rows(self.path(piece, VECTORS))[slice(*self._offsets(piece)[number : number + 2])]
            for piece in self.routed()
        ]

    def cell_chunks(self, number: int) -> Iterator[Vectors]:
        """A cell's unit vectors, in parts that fit in memory."""
        parts = self.cell(number)
        return chunks(parts, self.chunk_rows(parts[0].shape[1]))

    def sizes(self) -> NDArray[np.int64]:
        """Embeddings in each cell, [G]."""
        return np.sum([np.diff(self._offsets(piece)) for piece in self.routed()], axis=0, dtype=np.int64)

    def _offsets(self, piece: Piece) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = np.load(self.path(piece, OFFSETS), allow_pickle=False)
        return offsets


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
        chosen = evenly(int(size), max(rows, share))
        ends = np.cumsum([len(part) for part in parts])
        split = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        picked = [part[own - start] for part, own, start in zip(parts, split, starts, strict=True)]
        centers = split_cell(to_unit(np.concatenate(picked)), share, number, self.plan)
        labels = label_cell(self.cell_chunks(number), centers, int(shares[:number].sum()))
        for name, values in ((CENTERS, centers), (LABELS, labels)):
            with output.file(name) as file:
                np.save(file, values, allow_pickle=False)
        output.tick()


NEIGHBOURS, CHOSEN, SUMS, COUNTS, COSINE = (
    "neighbours.npy", "chosen.npy", "sums.npy", "counts.npy", "cosine.npy",
)  # fmt: skip


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
        outcome = gathered(self.turn, self.plan.cells, self.path)
        output.counts[f"clusters split in pass {self.turn - 1}"] += outcome.split
        centers = outcome.centers
        with output.file(CENTERS) as file:
            np.save(file, centers, allow_pickle=False)
        with output.file(NEIGHBOURS) as file:
            np.save(file, self.plan.near(self.turn, centers), allow_pickle=False)
        output.tick()


class Refine(CellStage):
    """Writes labels.npy, int32 [n], and what a cell's embeddings add to centers: see refinement.Sums."""

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
        centers = np.load(self.path(gathered_before, CENTERS), mmap_mode="r", allow_pickle=False)
        near = np.load(self.path(gathered_before, NEIGHBOURS), allow_pickle=False)
        labels = np.load(self.path(last, LABELS), allow_pickle=False)
        moved = refine(self.cell_chunks(number), labels, centers, near, self.plan.block(self.turn))
        sums = moved.sums
        for name, values in (
            (LABELS, moved.labels), (CHOSEN, sums.centers), (SUMS, sums.sums), (COUNTS, sums.counts),
            (COSINE, np.float64(sums.cosine)),
        ):  # fmt: skip
            with output.file(name) as file:
                np.save(file, values, allow_pickle=False)
        output.tick()


def before(turn: int, cells: int) -> list[Piece]:
    """The pieces that hold the centers from which a pass starts: one a cell, then those they refine."""
    pieces = [Piece(_before(turn), cell) for cell in range(cells)]
    return pieces if turn == 1 else [*pieces, Piece(f"gather-{turn - 1}", 0)]


def gathered(turn: int, cells: int, path: Callable[[Piece, str], object]) -> Gathered:
    """Add up what the pieces before a pass left.

    Args:
        turn: The pass that will start from it, counted from 1.
        cells: First-level cells, G.
        path: Where a file of a piece lies.
    """
    pieces = before(turn, cells)[:cells]

    def load(piece: Piece, name: str) -> Vectors:
        found: Vectors = np.load(str(path(piece, name)), mmap_mode="r", allow_pickle=False)
        return found

    if turn == 1:
        return Gathered(np.concatenate([load(piece, CENTERS) for piece in pieces]), 0)
    centers = np.load(str(path(Piece(f"gather-{turn - 1}", 0), CENTERS)), allow_pickle=False)
    sums = [
        Sums(
            np.asarray(load(piece, CHOSEN), dtype=np.int64),
            load(piece, SUMS),
            np.asarray(load(piece, COUNTS), dtype=np.int64),
            float(load(piece, COSINE)),
        )
        for piece in pieces
    ]
    return gather(centers, sums)


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
