"""Whether the clusters make good classes: their sizes, how tight they are, and how sure the labels are.

Shapes: m regions of a sample, K clusters, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.kmeans import find_centers, nearest_centers
from megaregion.curation.quality.agreement import nmi
from megaregion.curation.quality.regions import LabelledRegions, Sample
from megaregion.curation.stage import Job
from megaregion.curation.stages.cluster import CENTERS
from megaregion.curation.store import Piece

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
    centers = np.load(job.store.folder(Piece("cluster", 0)) / CENTERS, mmap_mode="r", allow_pickle=False)
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
        exact=float((nearest_centers(sample.vectors, np.asarray(centers))[0] == sample.labels).mean()),
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
        found = find_centers(sample.vectors, clusters, iterations, each)
        labels.append(nearest_centers(sample.vectors, found.centers)[0])
    return nmi(labels[0], labels[1])
