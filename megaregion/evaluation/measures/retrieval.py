"""Region retrieval: is another region of the same class, or the very same cut-out, among the nearest k?

Each of Q held-out objects asks all those of other scenes. Recall@k is the share of queries with a match among
the k most similar; a query without any match elsewhere is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoding import EncodedScenes
from megaregion.evaluation.measures import share
from megaregion.schemas.evaluation import Column, Estimate, Table

DEPTHS = (1, 5, 10)
"""Values of k."""


def retrieval_table(asked: EncodedScenes) -> Table:
    """Measure every encoder."""
    objects = asked.truth.objects
    kinds = (("class", "same class", objects.names), ("cutout", "same cut-out", objects.instances))
    matches = {kind: _matches(labels, objects.scene) for kind, _, labels in kinds}
    columns = tuple(
        Column(f"{kind}_at_{depth}", f"{title} @{depth}", _chance(matches[kind], objects.scene, depth))
        for kind, title, _ in kinds
        for depth in DEPTHS
    )
    told = (
        f"{np.count_nonzero(matches['class']):,} held-out objects ask for another one of their class and "
        f"{np.count_nonzero(matches['cutout']):,} for their own cut-out, among all held-out objects of other "
        "scenes: recall among the nearest 1, 5 and 10."
    )
    cutouts = np.asarray(objects.instances)
    rows: dict[str, dict[str, Estimate | None]] = {name: {} for name in asked.features}
    for name, features in asked.features.items():
        own = features.objects
        found = nearest(own, own, objects.scene, objects.scene, neighbours=max(DEPTHS))
        for kind, _, labels in kinds:
            label, asking = np.asarray(labels), matches[kind] > 0
            hit = (label[found.index] == label[:, None]) & (found.index >= 0)
            for depth in DEPTHS:
                recalled = hit[asking, :depth].any(axis=1)
                rows[name][f"{kind}_at_{depth}"] = share(recalled, cutouts[asking].tolist())
    return Table("retrieval", "Finding regions again", told, columns, rows, "random order")


def _matches(labels: Sequence[str], scene: NDArray[np.int64]) -> NDArray[np.int64]:
    """Regions of other scenes with the same label, [Q]."""
    _, label = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    _, pair = np.unique(np.stack([label, scene]), axis=1, return_inverse=True)
    of_label, of_pair = np.bincount(label), np.bincount(pair.ravel())
    return of_label[label] - of_pair[pair.ravel()]


def _chance(matches: NDArray[np.int64], scene: NDArray[np.int64], depth: int) -> float | None:
    """Expected recall of a random order: one minus the chance that none of the first k matches."""
    asking = matches > 0
    if not asking.any():
        return None
    offered = (len(scene) - np.bincount(scene)[scene])[asking]
    none = np.ones(len(offered))
    for place in range(depth):
        none *= np.clip((offered - matches[asking] - place) / np.maximum(offered - place, 1), 0, 1)
    return float(np.mean(1 - none))
