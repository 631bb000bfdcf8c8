"""Whether the clusters make good classes: their sizes, how tight they are, and how sure the labels are.

Everything is read from the files that the stages left, piece by piece, or from a sample of fixed size, so
that a report of a billion regions fits the memory of one of a thousand.

Shapes: m regions of a sample, K clusters, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megaregion.curation.embeddings import unit
from megaregion.curation.kmeans import find_centers
from megaregion.curation.nearest import nearest
from megaregion.curation.stages.cluster import CENTERS, COSINES, cluster_sizes, read_labels
from megaregion.curation.stages.embed import FEATURES
from megaregion.curation.stages.stage import Job
from megaregion.curation.stages.store import Piece

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
    settings = job.settings.cluster
    sizes, distance = cluster_sizes(job), 0.0
    for number, labels in enumerate(read_labels(job)):
        cosines = job.store.load(Piece("assign", number), COSINES)[labels >= 0]
        distance += float((2 - 2 * cosines.astype(np.float64)).sum())
    total = int(sizes.sum())
    sample = _take_sample(job, total)
    centers = job.store.load(Piece("cluster", 0), CENTERS)
    count = max(1, min(settings.clusters, len(sample.labels) // PER_CENTER))
    ordered = np.sort(sizes)
    return ClusterQuality(
        clusters=len(sizes),
        regions=total,
        empty=int((sizes == 0).sum()),
        sizes={f"p{q}": float(np.percentile(sizes, q)) for q in QUANTILES},
        gini=_gini(ordered),
        effective=float(np.exp(_entropy(sizes[sizes > 0] / max(1, total)))),
        largest_percent=float(ordered[-max(1, round(len(sizes) / 100)) :].sum() / max(1, total)),
        distance=distance / max(1, total),
        near_duplicates=_near_duplicates(job, sample),
        exact=float((_nearest(sample.vectors, centers) == sample.labels).mean()),
        stability=_stability(sample, count, settings.cluster_iterations, settings.cluster_seed),
        stability_clusters=count,
    )


class _Sample(NamedTuple):
    """Some regions: their unit vectors, [m, C], and their labels, [m]."""

    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]


def _vectors(job: Job, number: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    stored = job.store.load(Piece("embed", number), FEATURES, mapped=True)
    return unit(np.asarray(stored[rows]).astype(np.float32))


def _take_sample(job: Job, total: int) -> _Sample:
    """At most SAMPLE of so many labelled regions, evenly over the run."""
    step = max(1.0, total / SAMPLE)
    wanted = np.unique((np.arange(min(SAMPLE, total)) * step).astype(np.int64))
    vectors, kept, start = [], [], 0
    for number, labels in enumerate(read_labels(job)):
        rows = np.flatnonzero(labels >= 0)
        mine = rows[wanted[(wanted >= start) & (wanted < start + len(rows))] - start]
        start += len(rows)
        if len(mine):
            vectors.append(_vectors(job, number, mine))
            kept.append(labels[mine])
    return _Sample(np.concatenate(vectors), np.concatenate(kept))


def _near_duplicates(job: Job, sample: _Sample) -> float:
    """Looked for among the regions of the same cluster: two that are nearly equal have one center."""
    rows = np.unique(np.linspace(0, len(sample.labels) - 1, PROBED).astype(np.int64))
    members = _members(job, np.unique(sample.labels[rows]))
    near = 0
    for row in rows:
        cosines = members[int(sample.labels[row])] @ sample.vectors[row]
        # One of them is the region itself, unless it came too late to be among the members.
        itself = bool((cosines > 1 - 1e-4).any())
        near += int((cosines >= NEAR).sum() > itself)
    return near / len(rows)


def _members(job: Job, clusters: NDArray[np.int64]) -> dict[int, NDArray[np.float32]]:
    """Unit vectors of the first MEMBERS regions of each of some clusters."""
    found: dict[int, list[NDArray[np.float32]]] = {int(cluster): [] for cluster in clusters}
    have = dict.fromkeys(found, 0)
    for number, labels in enumerate(read_labels(job)):
        rows = np.flatnonzero(np.isin(labels, clusters))
        if not len(rows):
            continue
        vectors = _vectors(job, number, rows)
        for cluster in np.unique(labels[rows]).tolist():
            some = vectors[labels[rows] == cluster][: MEMBERS - have[cluster]]
            have[cluster] += len(some)
            found[cluster].append(some)
    return {cluster: np.concatenate(parts) for cluster, parts in found.items() if parts}


def _stability(sample: _Sample, clusters: int, iterations: int, seed: int) -> float:
    one, other = (find_centers(sample.vectors, clusters, iterations, each)[0] for each in (seed, seed + 1))
    return nmi(_nearest(sample.vectors, one), _nearest(sample.vectors, other))


def _nearest(vectors: NDArray[np.float32], centers: NDArray[np.float32]) -> NDArray[np.int64]:
    return nearest(torch.from_numpy(vectors), torch.from_numpy(centers)).labels.numpy()


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


def _gini(ordered: NDArray[np.int64]) -> float:
    count, total = len(ordered), float(ordered.sum())
    ranks = 2.0 * np.arange(1, count + 1) - count - 1
    return float(ranks @ ordered / (count * total)) if total else 0.0
