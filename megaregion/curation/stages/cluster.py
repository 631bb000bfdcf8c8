"""Stage cluster: the centers of all embeddings, one object class each.

Shapes: n regions of the whole run, K centers, L cells of centers, M neighbours of a center, C channels.
"""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from megaregion.curation.kmeans.features import Vectors, count_broken, to_unit
from megaregion.curation.kmeans.kmeans import find_centers
from megaregion.curation.kmeans.probing import ALL, build_probing
from megaregion.curation.stages.cells import ClusterStage, before, gathered
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.store import Output, Piece

CENTERS, CELLS, FIRST, NEIGHBOURS = "centers.npy", "cells.npy", "first.npy", "neighbours.npy"


class Cluster(ClusterStage):
    """Writes centers.npy, float32 [K, C], unit vectors.

    Where there are so many that regions cannot be compared with each, also what finds the nearest:
    cells.npy, float32 [L, C], first.npy, int64 [L + 1], and neighbours.npy, int32 [K, M].
    """

    name = "cluster"
    whole = True
    version = 2

    @override
    def needs(self, number: int) -> list[Piece]:
        if not self.active:
            return self.every("embed")
        return before(self.plan.passes + 1, self.plan.cells)

    @override
    def work(self, number: int, output: Output) -> None:
        centers = self._in_cells(output) if self.active else self._flat(output)
        if len(centers) > ALL:
            probing = build_probing(centers, self.plan.seed)
            centers = probing.centers
            output.save(CELLS, probing.cells)
            output.save(FIRST, probing.first)
            output.save(NEIGHBOURS, probing.neighbours)
        output.save(CENTERS, centers)
        output.tick()

    def _in_cells(self, output: Output) -> Vectors:
        centers, split = gathered(self.plan.passes + 1, self.plan.cells, self.job.store)
        output.counts[f"clusters split in pass {self.plan.passes}"] += split
        return centers

    def _flat(self, output: Output) -> Vectors:
        rows = np.concatenate([self.load(piece, FEATURES) for piece in self.needs(0)])
        output.counts["embeddings not finite"] += count_broken(rows)
        vectors, plan = to_unit(rows), self.plan
        return find_centers(vectors[vectors.any(axis=1)], plan.clusters, plan.iterations, plan.seed).centers
