"""Stage cluster: the centers of all embeddings, one object class each.

Shapes: K centers of C channels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from typing_extensions import override

from megaregion.curation.kmeans.embeddings import Share
from megaregion.curation.kmeans.passes import Pass, Progress, cluster
from megaregion.curation.kmeans.split import Plan
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Stage, plain
from megaregion.curation.stages.store import Output, Piece

CENTERS = "centers.npy"
LOG = logging.getLogger("megaregion.curation")


class Cluster(Stage):
    """Writes centers.npy, float32 [K, C], unit vectors; the ranks of a job do it together."""

    name = "cluster"
    whole = True
    together = True
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        # In which chunks embeddings add up.
        return plain(self.job.settings.cluster) | {"chunk_memory": self.job.settings.assign.chunk_memory}

    @override
    def needs(self, number: int) -> list[Piece]:
        return self.every("embed")

    @override
    def work(self, number: int, output: Output) -> None:
        settings = self.job.settings.cluster
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        files = [self.path(piece, FEATURES) for piece in self.needs(number)]
        share = Share(files, self.job.settings.assign.chunk_memory, device)
        plan = Plan(
            settings.clusters, settings.cluster_iterations, settings.cluster_seed, settings.first_level
        )
        centers = cluster(share, plan, Progress(output.kept("passes.npz"), output.key), _tell)
        if share.rank == 0:
            output.counts["embeddings not finite"] += share.broken
            output.save(CENTERS, centers.cpu().numpy())
            output.tick()


def _tell(done: Pass) -> None:
    LOG.info(
        "pass %d: mean cosine %.6f, %d centers exchanged, %.1f%% of all scores looked at",
        done.number, done.cosine, done.exchanged, 100 * done.scored,
    )  # fmt: skip
