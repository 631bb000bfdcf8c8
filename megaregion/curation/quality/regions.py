"""The labelled regions of a run, read slice by slice, and an even sample of their embeddings.

Shapes: r regions of a slice, n of the run, m of a sample, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.embedder import unit
from megaregion.curation.stage import Job
from megaregion.curation.stages.assign import COSINES, LABELS
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.store import Piece


@dataclass(frozen=True)
class Sample:
    """Some regions."""

    vectors: NDArray[np.float32]
    """Unit vectors, [m, C]."""
    labels: NDArray[np.int64]
    """[m]"""


class LabelledRegions:
    """What stages embed and assign left of every region with a label."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def labels(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
        """Slice, labels [r] and cosines to the center [r]; -1 is a region without label."""
        for number in range(self._job.source.slices):
            folder = self._job.store.folder(Piece("assign", number))
            labels, cosines = (np.load(folder / name, allow_pickle=False) for name in (LABELS, COSINES))
            yield number, labels, cosines

    def sample(self, size: int) -> Sample:
        """At most this many regions, evenly over the run."""
        total = sum(int((labels >= 0).sum()) for _, labels, _ in self.labels())
        step = max(1.0, total / max(1, size))
        wanted = np.unique((np.arange(min(size, total)) * step).astype(np.int64))
        vectors, kept, start = [], [], 0
        for number, labels, _ in self.labels():
            rows = np.flatnonzero(labels >= 0)
            mine = wanted[(wanted >= start) & (wanted < start + len(rows))] - start
            start += len(rows)
            if len(mine):
                vectors.append(self._vectors(number, rows[mine]))
                kept.append(labels[rows[mine]])
        return Sample(np.concatenate(vectors), np.concatenate(kept))

    def members(self, clusters: NDArray[np.int64], most: int) -> dict[int, NDArray[np.float32]]:
        """Unit vectors of the first regions, at most so many, of each of some clusters."""
        found: dict[int, list[NDArray[np.float32]]] = {int(cluster): [] for cluster in clusters}
        have = dict.fromkeys(found, 0)
        for number, labels, _ in self.labels():
            rows = np.flatnonzero(np.isin(labels, clusters))
            if not len(rows):
                continue
            vectors = self._vectors(number, rows)
            for cluster in np.unique(labels[rows]).tolist():
                some = vectors[labels[rows] == cluster][: most - have[cluster]]
                have[cluster] += len(some)
                found[cluster].append(some)
        return {cluster: np.concatenate(parts) for cluster, parts in found.items() if parts}

    def _vectors(self, number: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        folder = self._job.store.folder(Piece("embed", number))
        stored = np.load(folder / FEATURES, mmap_mode="r", allow_pickle=False)
        return unit(np.asarray(stored[rows]).astype(np.float32))
