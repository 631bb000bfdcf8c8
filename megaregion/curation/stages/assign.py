"""Stage assign: labels every region with its nearest center.

Shapes: r regions of the piece, K centers, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from megaregion.curation.kmeans import nearest_centers
from megaregion.curation.stage import Stage
from megaregion.curation.stages.cluster import CENTERS, load_features
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.store import Output, Piece

LABELS, COSINES = "labels.npy", "cosines.npy"


class Assign(Stage):
    """Writes labels.npy, int64 [r], -1 for a region without embedding, and cosines.npy, float32 [r]."""

    name = "assign"

    @override
    def settings(self) -> dict[str, Any]:
        return {}

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece("embed", number), Piece("cluster", 0)]

    @override
    def work(self, number: int, output: Output) -> None:
        features, centers = self.needs(number)
        vectors = load_features([self.path(features, FEATURES)])
        labels, cosines = nearest_centers(vectors, np.load(self.path(centers, CENTERS), allow_pickle=False))
        labels[~vectors.any(axis=1)] = -1
        for name, values in ((LABELS, labels), (COSINES, cosines)):
            with output.file(name) as file:
                np.save(file, values, allow_pickle=False)
        for _ in self.images(number):
            output.tick()
