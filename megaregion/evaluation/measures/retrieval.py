"""Region retrieval: is another region of the same class, or the very same cut-out, among the nearest k?

Every held-out object asks all held-out objects of other scenes. Recall@k is the share of queries with at
least one match among the k most similar; a query that has no match anywhere else is left out.

Shapes: Q objects, C feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.measures import share
from megaregion.evaluation.scenes import RegionTable
from megaregion.schemas.evaluation import Column, Estimate, Table

DEPTHS = (1, 5, 10)
"""Values of k."""


def retrieval_table(features: Mapping[str, Floats], objects: RegionTable) -> Table:
    """Measure every encoder, whose features of the held-out objects are [Q, C]."""
    kinds = (("class", "same class", objects.names), ("cutout", "same cut-out", objects.instances))
    asking = {kind: _matches(labels, objects.scene) > 0 for kind, _, labels in kinds}
    columns = tuple(
        Column(f"{kind}_at_{depth}", f"{title} @{depth}", _chance(labels, objects.scene, asking[kind], depth))
        for kind, title, labels in kinds
        for depth in DEPTHS
    )
    told = (
        f"{int(asking['class'].sum()):,} held-out objects ask for another one of their class and "
        f"{int(asking['cutout'].sum()):,} for their own cut-out, among all held-out objects of other "
        "scenes: recall among the nearest 1, 5 and 10."
    )
    cutouts = np.asarray(objects.instances)
    rows: dict[str, dict[str, Estimate | None]] = {name: {} for name in features}
    for name, own in features.items():
        found = nearest(own, own, objects.scene, objects.scene, neighbours=max(DEPTHS))
        for kind, _, labels in kinds:
            own_label = np.asarray(labels)
            hit = (own_label[found.index] == own_label[:, None]) & (found.index >= 0)
            for depth in DEPTHS:
                recalled = hit[asking[kind], :depth].any(axis=1)
                rows[name][f"{kind}_at_{depth}"] = share(recalled, cutouts[asking[kind]].tolist())
    return Table("retrieval", "Finding regions again", told, columns, rows, "random order")


def _matches(labels: Sequence[str], scene: NDArray[np.int64]) -> NDArray[np.int64]:
    """Regions of other scenes with the same label, [Q]."""
    _, label = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    _, pair = np.unique(np.stack([label, scene]), axis=1, return_inverse=True)
    of_label, of_pair = np.bincount(label), np.bincount(pair.ravel())
    return of_label[label] - of_pair[pair.ravel()]


def _chance(
    labels: Sequence[str], scene: NDArray[np.int64], asking: NDArray[np.bool_], depth: int
) -> float | None:
    """Expected recall of a random order: one minus the chance that none of the first k matches."""
    if not asking.any():
        return None
    matches = _matches(labels, scene)[asking].astype(np.float64)
    offered = len(labels) - np.bincount(scene)[scene][asking].astype(np.float64)
    none = np.ones(len(matches))
    for place in range(depth):
        none *= np.clip((offered - matches - place) / np.maximum(offered - place, 1), 0, 1)
    return float(np.mean(1 - none))
