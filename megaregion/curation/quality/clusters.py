"""Whether the clusters make good classes: their sizes, how tight they are, and how sure the labels are.

Shapes: m regions of a sample, K clusters, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megaregion.curation.kmeans import find_centers
from megaregion.curation.nearest import nearest
from megaregion.curation.stages.cluster import CENTERS, COSINES, LABELS
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece
from megaregion.curation.types import unit

NEAR = 0.97
"""Cosine from which two regions count as near-duplicates."""

SAMPLE = 20_000
"""Regions that are compared exactly."""

PROBED, MEMBERS = 200, 1000
"""Regions whose neighbours are looked for, and regions of each one's cluster that are looked at."""

PER_CENTER = 8
"""Least regions a center in the two clusterings that are compared; fewer would measure chance."""

QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)
"""Percentiles of the sizes that are reported."""


@dataclass(frozen=True)
class ClusterQuality:
    """How good the object labels are."""

    clusters: int
    regions: int
    empty: int
    sizes: dict[str, float]
    """Regions of a cluster, by percentile of the clusters."""
    gini: float
    """Imbalance: 0 if all clusters are equal, towards 1 if one holds everything."""
    effective: float
    """Clusters that would be as hard to guess from if all were equal: the exponential of the entropy."""
    largest_percent: float
    """Share of the regions that lies in the largest percent of the clusters."""
    distance: float
    """Mean squared distance of a region to its center, on the unit sphere: 2 - 2 cosine."""
    near_duplicates: float
    """Share of the regions with another one of the same cluster at a cosine of NEAR or more."""
    exact: float
    """Share of a sample whose label is the center that an exact search finds."""
    stability: float
    """NMI of two k-means over a sample that differ in the seed alone."""
    stability_clusters: int
    """Centers of these two."""


def cluster_quality(job: Job) -> ClusterQuality:
    """Measure the labels of a run whose stage assign is done."""
    regions = LabelledRegions(job)
    sizes = np.zeros(job.settings.cluster.clusters, dtype=np.int64)
    distance = 0.0
    for _, labels, cosines in regions.labels():
        sizes += np.bincount(labels[labels >= 0], minlength=len(sizes))
        distance += float((2 - 2 * cosines[labels >= 0].astype(np.float64)).sum())
    total = int(sizes.sum())
    sample = regions.sample(SAMPLE)
    centers = job.store.load(Piece("cluster", 0), CENTERS, mapped=True)
    settings = job.settings.cluster
    count = max(1, min(settings.clusters, len(sample.labels) // PER_CENTER))
    return ClusterQuality(
        clusters=len(sizes),
        regions=total,
        empty=int((sizes == 0).sum()),
        sizes={f"p{q}": float(np.percentile(sizes, q)) for q in QUANTILES},
        gini=_gini(sizes),
        effective=_effective(sizes),
        largest_percent=_largest_percent(sizes),
        distance=distance / max(1, total),
        near_duplicates=_near_duplicates(regions, sample),
        exact=float((_nearest(sample.vectors, np.asarray(centers)) == sample.labels).mean()),
        stability=_stability(sample, count, settings.cluster_iterations, settings.cluster_seed),
        stability_clusters=count,
    )


def _gini(sizes: NDArray[np.int64]) -> float:
    ordered, count = np.sort(sizes).astype(np.float64), len(sizes)
    if not ordered.sum():
        return 0.0
    ranks = np.arange(1, count + 1)
    return float((2 * ranks - count - 1) @ ordered / (count * ordered.sum()))


def _effective(sizes: NDArray[np.int64]) -> float:
    shares = sizes[sizes > 0] / max(1, sizes.sum())
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _largest_percent(sizes: NDArray[np.int64]) -> float:
    most = np.sort(sizes)[::-1][: max(1, round(len(sizes) / 100))]
    return float(most.sum() / max(1, sizes.sum()))


def _near_duplicates(regions: LabelledRegions, sample: Sample) -> float:
    """Looked for among the regions of the same cluster: two that are nearly equal have one center."""
    rows = np.unique(np.linspace(0, len(sample.labels) - 1, PROBED).astype(np.int64))
    members = regions.members(np.unique(sample.labels[rows]), MEMBERS)
    near = 0
    for row in rows:
        cosines = members[int(sample.labels[row])] @ sample.vectors[row]
        # One of them is the region itself, unless it came too late to be among the members.
        itself = bool((cosines > 1 - 1e-4).any())
        near += int((cosines >= NEAR).sum() > itself)
    return near / len(rows)


def _stability(sample: Sample, clusters: int, iterations: int, seed: int) -> float:
    labels = []
    for each in (seed, seed + 1):
        found, _ = find_centers(sample.vectors, clusters, iterations, each)
        labels.append(_nearest(sample.vectors, found))
    return nmi(labels[0], labels[1])


def _nearest(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    return nearest(torch.from_numpy(vectors), torch.from_numpy(centers)).labels.numpy()


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
            piece = Piece("assign", number)
            yield number, self._job.store.load(piece, LABELS), self._job.store.load(piece, COSINES)

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
        stored = self._job.store.load(Piece("embed", number), FEATURES, mapped=True)
        return unit(np.asarray(stored[rows]).astype(np.float32))


def nmi(some: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Normalised mutual information of two labellings [n], with the mean of both entropies below.

    Returns:
        0 for independent labellings, 1 for equal ones whatever the names; 1 if neither tells anything apart.
    """
    if not len(some):
        return 1.0
    _, rows = np.unique(some, return_inverse=True)
    _, columns = np.unique(others, return_inverse=True)
    pairs, counts = np.unique(rows * (columns.max() + 1) + columns, return_counts=True)
    joint = counts / len(some)
    first, second = np.bincount(rows) / len(some), np.bincount(columns) / len(some)
    cells = first[pairs // len(second)] * second[pairs % len(second)]
    shared = float((joint * np.log(joint / cells)).sum())
    mean = (_entropy(first) + _entropy(second)) / 2
    return shared / mean if mean > 0 else 1.0


def _entropy(shares: NDArray[np.float64]) -> float:
    return float(-(shares * np.log(shares)).sum())
