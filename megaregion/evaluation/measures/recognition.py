"""Which class an object is of: k-NN and a linear probe on region features, over galleries of several seeds.

A seed draws four fifths of the training scenes as its gallery, so the spread over seeds says how much is owed
to which scenes were composed. Shapes: Q test objects, G gallery objects, R any, C feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import NEIGHBOURS, choose_decay, fit_probe, nearest, vote
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import EncodedScenes
from megaregion.evaluation.measures import share
from megaregion.evaluation.scenes import RegionTable
from megaregion.schemas.evaluation import Column, Estimate, Table

GALLERY_SHARE = 0.8
"""Share of the training scenes that one seed draws."""

Draw = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Rows of a seed's gallery, [G], and the rows that it asks about, [Q]."""


Named = tuple[Floats, RegionTable]
"""Features of one split, [R, C], and what they are of."""


def recognition_table(known: EncodedScenes, asked: EncodedScenes, seeds: int) -> Table:
    """Measure every encoder."""
    gallery, queries = known.truth.objects, asked.truth.objects
    told = (
        f"{len(queries):,} held-out objects of {len(set(queries.instances)):,} unseen cut-outs and "
        f"{len(set(queries.names))} classes; mean over {seeds} galleries, each {GALLERY_SHARE:.0%} of the "
        "training scenes."
    )
    every = np.ones(len(queries), np.bool_)
    draws = [(draw_scenes(gallery.scene, seed, seeds), every) for seed in range(seeds)]
    rows = {
        name: recognise((known.features[name].objects, gallery), (own.objects, queries), draws)
        for name, own in asked.features.items()
    }
    columns = class_columns(majority_share(gallery.names, queries.names))
    return Table("region", "Naming regions", told, columns, rows, "most frequent class")


def class_columns(chance: float) -> tuple[Column, ...]:
    """The columns that :func:`recognise` fills."""
    return Column("knn", f"{NEIGHBOURS}-NN", chance), Column("linear", "linear probe", chance)


def recognise(
    known: Named, asked: Named, draws: Sequence[Draw], tuning: NDArray[np.bool_] | slice = slice(None)
) -> dict[str, Estimate | None]:
    """Accuracy of one encoder by k-NN and by a linear probe, with what regions show as groups.

    The probe's weight decay is chosen on the rows ``tuning`` of what is known.
    """
    (seen, gallery), (features, queries) = known, asked
    names, true, instances = map(np.asarray, (gallery.names, queries.names, gallery.instances))
    decay = choose_decay(seen[tuning], names[tuning].tolist(), instances[tuning].tolist())
    right = np.zeros((2, len(draws), len(true)))
    for seed, (drawn, rows) in enumerate(draws):
        labels = names[drawn].tolist()
        by_neighbours = vote(nearest(features[rows], seen[drawn]), labels)
        by_probe = fit_probe(seen[drawn], labels, decay).predict(features[rows])
        right[:, seed, rows] = np.stack([by_neighbours, by_probe]) == true[rows]
    counted = np.stack([rows for _, rows in draws])
    knn, linear = (share(verdicts, queries.instances, counted) for verdicts in right)
    return {"knn": knn, "linear": linear}


def draw_scenes(scenes: NDArray[np.int64], seed: int, seeds: int) -> NDArray[np.bool_]:
    """Rows whose scene a seed draws, [R]; all of them where there is but one seed."""
    if seeds == 1:
        return np.ones(len(scenes), np.bool_)
    distinct = np.unique(scenes)
    kept = max(1, round(GALLERY_SHARE * len(distinct)))
    return np.isin(scenes, np.random.Generator(np.random.Philox(key=seed)).permutation(distinct)[:kept])


def majority_share(known: Sequence[str], asked: Sequence[str]) -> float:
    """Accuracy of always naming the gallery's most frequent class, what a measure must beat."""
    names, counts = np.unique(np.asarray(known), return_counts=True)
    return float(np.mean(np.asarray(asked) == names[counts.argmax()]))
