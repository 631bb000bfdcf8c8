"""Stages cluster and assign: centers, and the nearest of each region.

Shapes: r regions of a piece, K clusters or centers, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.stages.regions import FEATURES
from megaregion.curation.stages.stage import Job, Output, Piece, Stage, plain

CENTERS = "centers.npy"
LABELS, COSINES, OTHERS = "labels.npy", "cosines.npy", "others.npy"
LOG = logging.getLogger("megaregion.curation")


class Cluster(Stage):
    """Writes centers.npy, float32 [K, C], unit vectors; the ranks of a job do it together."""

    name = "cluster"
    reads = ("embed",)
    whole = True
    together = True
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        # In which chunks embeddings add up.
        return plain(self.job.settings.cluster) | {"chunk_memory": self.job.settings.assign.chunk_memory}

    @override
    def work(self, number: int, output: Output) -> None:
        from megaregion.curation.embeddings import Embeddings, own_device
        from megaregion.curation.kmeans import Pass, passes

        files = [self.path(piece, FEATURES) for piece in self.needs(number)]
        embeddings = Embeddings(files, self.job.settings.assign.chunk_memory, own_device())
        kept = output.kept("passes.npz")
        last = begun = Pass.load(kept, output.key)
        for last in passes(embeddings, self.job.settings.cluster, begun):
            LOG.info(
                "pass %d: mean cosine %.6f, %d centers exchanged, %.1f%% of all scores looked at",
                last.number, last.cosine, last.exchanged, 100 * last.scored,
            )  # fmt: skip
            if embeddings.rank == 0:
                last.save(kept, output.key)
        if embeddings.rank == 0 and last:
            output.counts["embeddings not finite"] += embeddings.broken
            output.save(CENTERS, last.centers.cpu().numpy())
            output.tick()


class Assign(Stage):
    """Writes labels.npy, int64 [r], -1 for a region without embedding, and cosines.npy, float32 [r].

    Where several labels are wanted, others.npy, int64 [r, k - 1], has the next nearest centers.
    """

    name = "assign"
    reads = ("embed",)
    reads_whole = ("cluster",)
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        wanted = self.job.settings.assign.labels_per_region
        # Pieces of before there were several labels stay what they are.
        return {"labels_per_region": wanted} if wanted > 1 else {}

    @override
    def work(self, number: int, output: Output) -> None:
        import torch

        from megaregion.curation.embeddings import own_device, rows_in
        from megaregion.curation.kmeans import label_rows

        features, clustered = self.needs(number)
        rows = self.job.store.load(features, FEATURES, mapped=True)
        size = rows_in(self.job.settings.assign.chunk_memory, rows.shape[1])
        centers = torch.from_numpy(self.job.store.load(clustered, CENTERS)).to(own_device())
        wanted = min(self.job.settings.assign.labels_per_region, len(centers))
        parts = (rows[start : start + size] for start in range(0, max(1, len(rows)), size))
        found = [label_rows(part, centers, wanted) for part in parts]
        labels, cosines = (torch.cat(each).cpu().numpy() for each in zip(*found, strict=True))
        output.save(LABELS, np.ascontiguousarray(labels[:, 0]))
        output.save(COSINES, cosines)
        if self.settings():
            output.save(OTHERS, np.ascontiguousarray(labels[:, 1:]))
        for _ in range(self.count(number)):
            output.tick()


def read_labels(job: Job) -> Iterator[NDArray[np.int64]]:
    """Labels of each slice's regions, [r], in order; -1 is a region without label."""
    for number in range(job.source.slices):
        yield job.store.load(Piece("assign", number), LABELS)


def cluster_sizes(job: Job, labels: Iterable[NDArray[np.int64]] | None = None) -> NDArray[np.int64]:
    """Regions of each cluster in the whole run, [K]; by these labels of its slices, if given."""
    sizes = np.zeros(job.settings.cluster.clusters, dtype=np.int64)
    for own in read_labels(job) if labels is None else labels:
        np.add.at(sizes, own[own >= 0], 1)
    return sizes
