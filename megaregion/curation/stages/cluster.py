"""Stage cluster: the centers of all embeddings, one object class each.

Shapes: n regions of the whole run, K centers, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.embedder import unit
from megaregion.curation.kmeans import find_centers
from megaregion.curation.stage import Stage, plain
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.store import Output, Piece

CENTERS = "centers.npy"


class Cluster(Stage):
    """Writes centers.npy, float32 [K, C], unit vectors."""

    name = "cluster"
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        return plain(self.job.settings.cluster)

    @override
    def needs(self, number: int) -> list[Piece]:
        return [Piece("embed", piece) for piece in range(self.slices())]

    @override
    def work(self, number: int, output: Output) -> None:
        settings = self.job.settings.cluster
        vectors = load_features([self.path(piece, FEATURES) for piece in self.needs(number)])
        vectors = vectors[vectors.any(axis=1)]
        found = find_centers(vectors, settings.clusters, settings.cluster_iterations, settings.cluster_seed)
        with output.file(CENTERS) as file:
            np.save(file, found.centers, allow_pickle=False)
        output.tick()


def load_features(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Embeddings of several pieces as unit vectors, [n, C]; half precision had bent their length."""
    arrays = [np.load(path, allow_pickle=False) for path in paths]
    return unit(np.concatenate(arrays).astype(np.float32))
