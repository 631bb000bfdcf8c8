"""Stages cluster, assign and balance: centers, the nearest of each region, what is packed of large clusters.

Of a cluster with more regions than the cap, exactly as many as the cap are kept, spread evenly over the run.
Labels are read piece by piece; memory grows with the number of clusters only.

Shapes: n regions of the whole run, r of a piece, K clusters or centers, C channels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from megaregion.curation.embeddings import Share, rows_in, to_unit
from megaregion.curation.kmeans import Pass, Progress, cluster
from megaregion.curation.nearest import nearest
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Job, Stage, plain
from megaregion.curation.stages.store import Output, Piece

CENTERS = "centers.npy"
LABELS, COSINES = "labels.npy", "cosines.npy"
KEPT, STARTS = "kept.npy", "starts.npy"
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
        files = [self.path(piece, FEATURES) for piece in self.needs(number)]
        share = Share(files, self.job.settings.assign.chunk_memory, _device())
        progress = Progress(output.kept("passes.npz"), output.key)
        centers = cluster(share, self.job.settings.cluster, progress, _tell)
        if share.rank == 0:
            output.counts["embeddings not finite"] += share.broken
            output.save(CENTERS, centers.cpu().numpy())
            output.tick()


def _tell(done: Pass) -> None:
    LOG.info(
        "pass %d: mean cosine %.6f, %d centers exchanged, %.1f%% of all scores looked at",
        done.number, done.cosine, done.exchanged, 100 * done.scored,
    )  # fmt: skip


def _device() -> torch.device:
    gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


class Assign(Stage):
    """Writes labels.npy, int64 [r], -1 for a region without embedding, and cosines.npy, float32 [r]."""

    name = "assign"
    reads = ("embed",)
    reads_whole = ("cluster",)
    version = 3

    @override
    def settings(self) -> dict[str, Any]:
        return {}

    @override
    def work(self, number: int, output: Output) -> None:
        features, clustered = self.needs(number)
        rows = self.job.store.load(features, FEATURES, mapped=True)
        labels = np.full(len(rows), -1, dtype=np.int64)
        cosines = np.zeros(len(rows), dtype=np.float32)
        size = rows_in(self.job.settings.assign.chunk_memory, rows.shape[1])
        centers = torch.from_numpy(self.job.store.load(clustered, CENTERS)).to(_device())
        for start in range(0, len(rows), size):
            vectors = to_unit(rows[start : start + size])
            usable = np.flatnonzero(vectors.any(axis=1))
            found = nearest(torch.from_numpy(vectors[usable]).to(centers.device), centers)
            labels[start + usable], cosines[start + usable] = found.labels.cpu(), found.best.cpu()
        output.save(LABELS, labels)
        output.save(COSINES, cosines)
        for _ in range(self.count(number)):
            output.tick()


def read_labels(job: Job) -> Iterator[NDArray[np.int64]]:
    """Labels of each slice's regions, [r], in order; -1 is a region without label."""
    for number in range(job.source.slices):
        yield job.store.load(Piece("assign", number), LABELS)


def cluster_sizes(job: Job) -> NDArray[np.int64]:
    """Regions of each cluster in the whole run, [K]."""
    sizes = np.zeros(job.settings.cluster.clusters, dtype=np.int64)
    for labels in read_labels(job):
        sizes += np.bincount(labels[labels >= 0], minlength=len(sizes))
    return sizes


class Balance(Stage):
    """Writes kept.npy, bool [n], and starts.npy, int64 [slices + 1]: where each slice's regions begin there.

    Without a cap there is nothing to do.
    """

    name = "balance"
    reads = ("assign",)
    whole = True

    @override
    def settings(self) -> dict[str, Any]:
        return {"cluster_cap": self.job.settings.pack.cluster_cap}

    @override
    def pieces(self) -> int:
        return int(self.job.settings.pack.cluster_cap > 0)

    @override
    def work(self, number: int, output: Output) -> None:
        sizes = cluster_sizes(self.job)
        labelled = (self.job.store.load(piece, LABELS, mapped=True) for piece in self.needs(number))
        starts = np.cumsum([0, *map(len, labelled)], dtype=np.int64)
        output.save(STARTS, starts)
        caps = np.minimum(sizes, self.job.settings.pack.cluster_cap)
        seen = np.zeros_like(sizes)
        with output.file(KEPT) as file:
            header = {"descr": "|b1", "fortran_order": False, "shape": (int(starts[-1]),)}
            np.lib.format.write_array_header_1_0(file, header)
            for labels in read_labels(self.job):
                file.write(keep_evenly(labels, seen, sizes, caps).tobytes())
        output.counts["clusters capped"] = int((sizes > caps).sum())
        output.counts["regions over the cap"] = int((sizes - caps).sum())
        output.tick()


def keep_evenly(
    labels: NDArray[np.int64], seen: NDArray[np.int64], sizes: NDArray[np.int64], caps: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Choose the regions of a piece that stay: every size/cap-th of each cluster.

    Args:
        labels: Clusters, -1 for none, int64 [r].
        seen: Regions of each cluster in the pieces before; counted on here, int64 [K].
        sizes: Regions of each cluster in the whole run, int64 [K].
        caps: How many of them stay, int64 [K].

    Returns:
        bool [r]; over all pieces exactly caps[k] of cluster k are True.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    clusters = labels[order]
    firsts = np.flatnonzero(np.diff(clusters, prepend=-1))
    lengths = np.diff(firsts, append=len(clusters))
    place = seen[clusters] + np.arange(len(clusters)) - np.repeat(firsts, lengths)
    kept = np.zeros(len(labels), dtype=bool)
    share, whole = caps[clusters], np.maximum(sizes[clusters], 1)
    kept[order] = (place + 1) * share // whole > place * share // whole
    seen[clusters[firsts]] += lengths
    return kept
