"""Region retrieval: is another region of the same class, or the very same cut-out, among the nearest k?

Every held-out object asks all held-out objects of other scenes. Recall@k is the share of queries with at
least one match among the k most similar; a query that has no match anywhere else is left out.

Shapes: Q objects, C feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import Neighbours, nearest
from megaregion.evaluation.estimates import share
from megaregion.evaluation.scenes import RegionTable
from megaregion.schemas.evaluation import Column, Estimate, Table

DEPTHS = (1, 5, 10)
"""Values of k."""


def retrieval_table(features: Mapping[str, NDArray[np.float32]], objects: RegionTable) -> Table:
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
    rows: dict[str, dict[str, Estimate | None]] = {name: {} for name in features}
    for name, own in features.items():
        found = nearest(own, own, objects.scene, objects.scene, neighbours=max(DEPTHS))
        for kind, _, labels in kinds:
            recalls = _recalls(found, np.asarray(labels), asking[kind], np.asarray(objects.instances))
            rows[name] |= {f"{kind}_at_{depth}": recall for depth, recall in recalls.items()}
    return Table("retrieval", "Finding regions again", told, columns, rows, "random order")


def _recalls(
    found: Neighbours, labels: NDArray[np.str_], asking: NDArray[np.bool_], cutouts: NDArray[np.str_]
) -> dict[int, Estimate | None]:
    """Recall at each depth of the queries that have a match at all; a match is one of the same label."""
    hit = (labels[found.index] == labels[:, None]) & (found.index >= 0)
    return {depth: share(hit[asking, :depth].any(axis=1), cutouts[asking].tolist()) for depth in DEPTHS}


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
