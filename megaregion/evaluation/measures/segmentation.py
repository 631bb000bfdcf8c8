"""Segmentation probe: a linear probe learns classes from mask-pooled features and names every place.

Training rows are mean features under the true masks of training scenes, and under the background of each
quarter of a scene. Scores at every cell of a held-out scene's map are brought to the truth's cells and named:
mean IoU over the classes and the background; places under words do not count.

Shapes: K classes with the background first, T x T truth cells, h x w cells of a map, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.classifiers import Probe, choose_decay, fit_probe
from megaregion.evaluation.encoders import Floats
from megaregion.evaluation.encoding import MappedScenes, pooled, resized
from megaregion.evaluation.measures import Sums, estimate
from megaregion.evaluation.measures.recognition import Named, draw_scenes
from megaregion.evaluation.scenes import TRUTH, class_map, unboxed
from megaregion.schemas.evaluation import Column, Estimate, Table

BACKGROUND = "(background)"
"""Sorts before any class."""


def segmentation_table(known: MappedScenes, asked: MappedScenes, seeds: int) -> Table:
    """Measure every encoder that has maps."""
    told = (
        f"{len(asked.scenes)} held-out scenes against mask-pooled features of {len(known.scenes)} training "
        f"scenes, mean over {seeds} draws of them: intersection over union at {TRUTH} x {TRUTH} places, mean "
        "over classes and background."
    )
    rows = {name: _row(name, known, asked, seeds) for name in known.maps}
    blind = Column("miou", "mIoU", _all_background(asked))
    columns = (blind, Column("object_miou", "mIoU, objects only", 0.0))
    return Table("segmentation", "Naming every place", told, columns, rows, "all background")


def mask_rows(known: MappedScenes, encoder: str) -> Named:
    """Mean features under every true mask, and under the background of each quarter of a scene.

    A background's cut-out is its scene.
    """
    features, names, instances, places = [], [], [], []
    halves = slice(TRUTH // 2), slice(TRUTH // 2, TRUTH)
    for place, (scene, truth) in enumerate(zip(known.scenes, known.truths, strict=True)):
        masks = [(item.name, item.instance, truth == n) for n, item in enumerate(scene.objects, start=1)]
        for quarter in product(halves, halves):
            background = np.zeros((TRUTH, TRUTH), np.bool_)
            background[quarter] = truth[quarter] == 0
            masks.append((BACKGROUND, scene.key, background))
        for name, instance, mask in masks:
            if mask.any():
                features.append(pooled(known.maps[encoder][place], mask))
                names.append(name)
                instances.append(instance)
                places.append(place)
    return np.stack(features), unboxed(names, instances, np.asarray(places, np.int64))


def _row(encoder: str, known: MappedScenes, asked: MappedScenes, seeds: int) -> dict[str, Estimate | None]:
    features, rows = mask_rows(known, encoder)
    decay = choose_decay(features, rows.names, rows.instances)
    classes = sorted(set(rows.names))
    truths = [class_map(*own, classes[1:]) for own in zip(asked.scenes, asked.truths, strict=True)]
    parts = []
    for seed in range(seeds):
        drawn = np.flatnonzero(draw_scenes(rows.scene, seed, seeds)).tolist()
        fitted = fit_probe(features[drawn], [rows.names[row] for row in drawn], decay)
        named = (_named_places(fitted, own, classes) for own in asked.maps[encoder])
        parts.append([overlaps(*pair, len(classes)) for pair in zip(named, truths, strict=True)])
    joined = np.asarray(parts)
    return {"miou": estimate(joined, mean_iou), "object_miou": estimate(joined, partial(mean_iou, first=1))}


def _named_places(fitted: Probe, own: Floats, classes: Sequence[str]) -> NDArray[np.int64]:
    """The class of each place by a map, [T, T], over the classes of all seeds."""
    scores = fitted.scores(own.reshape(-1, own.shape[-1])).reshape(*own.shape[:2], -1)
    return np.asarray([classes.index(name) for name in fitted.classes])[resized(scores).argmax(axis=-1)]


def overlaps(predicted: NDArray[np.int64], true: NDArray[np.int16], classes: int) -> Sums:
    """Places of each class that are named right, that are true and that are named, [3 * K]; none below 0."""
    counted = true >= 0
    predicted, true = predicted[counted], true[counted]
    parts = predicted[predicted == true], true, predicted
    return np.concatenate([np.bincount(part, minlength=classes) for part in parts]).astype(np.float64)


def mean_iou(sums: Sums, first: int = 0) -> Sums:
    """Mean intersection over union of the classes from the first on that occur, [..., 3 * K] to [...]."""
    hits, true, named = np.split(sums, 3, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A class without a true pixel in the draw says nothing of the class.
        shares = np.where(true > 0, hits / (true + named - hits), np.nan)[..., first:]
        return np.divide(np.nansum(shares, axis=-1), np.isfinite(shares).sum(axis=-1))


def _all_background(asked: MappedScenes) -> float:
    """MIoU of calling every place background: its share of the places; no other class is ever hit."""
    names = sorted({item.name for scene in asked.scenes for item in scene.objects})
    true = np.stack([class_map(*own, names) for own in zip(asked.scenes, asked.truths, strict=True)])
    counts = np.bincount(true[true >= 0])
    return float(counts[0] / counts.sum() / np.count_nonzero(counts))
