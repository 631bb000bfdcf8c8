"""Stages gather-N and refine-N: the passes over all embeddings after the cells are done.

gather-N adds up what the pieces before it left, to centers and the neighbours of each; refine-N moves every
embedding to the nearest of the centers around its own. There is a pair of them for each pass, so that any
pass is made of independent pieces and no kill costs more than one of them.

Shapes: n embeddings of a cell, K centers, M neighbours of each, T centers that a cell's embeddings chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from typing_extensions import override

from megaregion.curation.kmeans import Vectors
from megaregion.curation.refinement import Gathered, Sums, gather, refine
from megaregion.curation.settings import MAX_PASSES
from megaregion.curation.stage import Stage
from megaregion.curation.stages.coarse import ClusterStage
from megaregion.curation.stages.split import CENTERS, LABELS, CellStage
from megaregion.curation.store import Output, Piece

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
