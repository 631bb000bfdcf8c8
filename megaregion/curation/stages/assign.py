"""Stage assign: labels every region with its nearest center.

Shapes: r regions of the piece, K centers, C channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.features import open_rows, rows_in, to_unit
from megaregion.curation.hierarchy import in_chunks
from megaregion.curation.kmeans import Vectors, nearest_centers
from megaregion.curation.probing import Probing
from megaregion.curation.stage import Stage
from megaregion.curation.stages.cluster import CELLS, CENTERS, FIRST, NEIGHBOURS
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.store import Output, Piece

LABELS, COSINES = "labels.npy", "cosines.npy"


class Assign(Stage):
    """Writes labels.npy, int64 [r], -1 for a region without embedding, and cosines.npy, float32 [r]."""

    name = "assign"
    version = 2

    @override
    def settings(self) -> dict[str, Any]:
        return {"assign_probes": self.job.settings.assign.assign_probes}

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece("embed", number), Piece("cluster", 0)]

    @override
    def work(self, number: int, output: Output) -> None:
        features, cluster = self.needs(number)
        rows = open_rows(self.path(features, FEATURES))
        labels = np.full(len(rows), -1, dtype=np.int64)
        cosines = np.zeros(len(rows), dtype=np.float32)
        size = rows_in(self.job.settings.assign.chunk_memory, rows.shape[1])
        for start, chunk in zip(range(0, len(rows), size), in_chunks(rows, size), strict=True):
            vectors = to_unit(chunk)
            usable = np.flatnonzero(vectors.any(axis=1))
            found = self._find(cluster, vectors[usable])
            labels[start + usable], cosines[start + usable] = found
        for name, values in ((LABELS, labels), (COSINES, cosines)):
            with output.file(name) as file:
                np.save(file, values, allow_pickle=False)
        for _ in self.images(number):
            output.tick()

    def _find(self, cluster: Piece, vectors: Vectors) -> tuple[NDArray[np.int64], Vectors]:
        centers = _load(self.path(cluster, CENTERS))
        if not self.path(cluster, CELLS).exists():
            return nearest_centers(vectors, centers)
        probing = Probing(
            centers,
            _load(self.path(cluster, CELLS)),
            _load(self.path(cluster, FIRST)),
            _load(self.path(cluster, NEIGHBOURS)),
        )
        return probing.find(vectors, self.job.settings.assign.assign_probes)


def _load(path: Path) -> NDArray[Any]:
    found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return found
