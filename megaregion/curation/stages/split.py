"""Stage split: each first-level cell finds its own centers, alone.

Shapes: n embeddings of a cell, K centers of the run, k of a cell, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.features import chunks, open_rows, to_unit
from megaregion.curation.hierarchy import evenly, label_cell, share_out, split_cell
from megaregion.curation.kmeans import Vectors
from megaregion.curation.source import ImageFile
from megaregion.curation.stages.coarse import OFFSETS, VECTORS, ClusterStage
from megaregion.curation.store import Output, Piece

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
