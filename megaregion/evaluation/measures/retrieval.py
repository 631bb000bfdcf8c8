"""Region retrieval: is another region of the same class, or the very same cut-out, among the nearest k?

Each of Q held-out objects asks all those of other scenes. Recall@k is the share of queries with a match among
the k most similar; a query without any match elsewhere is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import EncodedScenes
from megaregion.evaluation.measures import share
from megaregion.evaluation.scenes import RegionTable
from megaregion.schemas.evaluation import Column, Estimate, Table

DEPTHS = (1, 5, 10)
"""Values of k."""
TITLES = {"class": "same class", "cutout": "same cut-out"}


def retrieval_table(asked: EncodedScenes) -> Table:
    """Measure every encoder."""
    objects = asked.truth.objects
    kinds = {"class": objects.names, "cutout": objects.instances}
    columns = retrieval_columns(objects.scene, kinds)
    told = (
        f"{asking(objects.scene, objects.names).sum():,} held-out objects ask for another one of their class "
        f"and {asking(objects.scene, objects.instances).sum():,} for their own cut-out, among all held-out "
        "objects of other scenes: recall among the nearest 1, 5 and 10."
    )
    rows = {name: recalled(own.objects, objects, kinds) for name, own in asked.features.items()}
    return Table("retrieval", "Finding regions again", told, columns, rows, "random order")


def retrieval_columns(scene: NDArray[np.int64], kinds: Mapping[str, Sequence[str]]) -> tuple[Column, ...]:
    """The columns that :func:`recalled` fills, given the labels of each kind."""
    return tuple(
        Column(f"{kind}_at_{depth}", f"{TITLES[kind]} @{depth}", _chance(matches, scene, depth))
        for kind, matches in ((kind, _matches(labels, scene)) for kind, labels in kinds.items())
        for depth in DEPTHS
    )


def recalled(
    features: Floats, objects: RegionTable, kinds: Mapping[str, Sequence[str]]
) -> dict[str, Estimate | None]:
    """Recall of one encoder's features [Q, C], with what objects show as groups."""
    found = nearest(features, features, objects.scene, objects.scene, neighbours=max(DEPTHS))
    groups, row = np.asarray(objects.instances), dict[str, "Estimate | None"]()
    for kind, labels in kinds.items():
        label, asks = np.unique(np.asarray(labels), return_inverse=True)[1], asking(objects.scene, labels)
        hit = (label[found.index] == label[:, None]) & (found.index >= 0)
        for depth in DEPTHS:
            row[f"{kind}_at_{depth}"] = share(hit[asks, :depth].any(axis=1), groups[asks])
    return row


def asking(scene: NDArray[np.int64], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Which objects have another one of their label in another scene, [Q]."""
    return _matches(labels, scene) > 0


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
