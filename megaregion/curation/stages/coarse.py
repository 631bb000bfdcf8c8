"""Stages coarse and route: the first level of k-means, and every embedding in its cell.

Both have no piece where --cluster-method makes k-means flat.

Shapes: n embeddings of the run, r of a piece, G cells, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from megaregion.curation.features import count_broken, open_rows, rows_in, to_unit
from megaregion.curation.hierarchy import SAMPLE, Plan, evenly, find_cells, in_chunks
from megaregion.curation.kmeans import check_enough, nearest
from megaregion.curation.stage import Stage, plain
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.store import Output, Piece

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
