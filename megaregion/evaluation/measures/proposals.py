"""Recall of box proposals, before any encoder: how many of the annotated objects a proposer frames.

What no proposal frames, curation never labels, whatever the encoder. Baseline: the whole image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.evaluation.annotated import Annotated, open_scene
from megaregion.evaluation.encoders import Floats, Pixels
from megaregion.evaluation.encoding import Batches
from megaregion.evaluation.measures import share
from megaregion.schemas.evaluation import Column, Estimate, Table

MOST_IMAGES = 500
"""Images that are searched, evenly spaced."""
STEPS = np.arange(0.5, 1.0, 0.05)
"""Intersections over union at which the average recall is taken, as COCO does."""

Propose = Callable[[Pixels], NDArray[np.float64]]
"""From an image, RGB [h, w, 3], to boxes [n, 4] in its pixels."""


class _Found(NamedTuple):
    best: NDArray[np.float64]
    """Greatest intersection over union of each object with any proposal."""
    whole: NDArray[np.float64]
    """That with the whole image."""
    boxes: int


def proposals_table(data: Annotated, proposer: str, propose: Propose, batches: Batches) -> Table:
    """Measure one proposer."""
    scenes = data.asked.scenes
    every = np.unique(np.linspace(0, len(scenes) - 1, min(MOST_IMAGES, len(scenes))).round().astype(int))
    searched = [scenes[place] for place in every]

    def search(place: int) -> _Found:
        scene = searched[place]
        found = propose(np.asarray(open_scene(scene))).reshape(-1, 4)
        whole = np.asarray([[0, 0, scene.width, scene.height]], np.float64)
        best, frames = (overlap_of(scene.boxes, own).max(axis=1, initial=0) for own in (found, whole))
        return _Found(best, frames, len(found))

    parts = batches.ask("proposals", range(len(searched)), search, {proposer: lambda found: found})[proposer]
    images = [found for part in parts for found in part]
    groups = np.repeat([scene.key for scene in searched], [len(scene.objects) for scene in searched])
    best, whole = (np.concatenate([getattr(found, key) for found in images]) for key in ("best", "whole"))
    mean = "recall, mean of IoU 0.5 to 0.95"
    verdicts = {
        "recall_50": ("recall at IoU 0.5", lambda iou: iou >= 0.5),
        "recall_75": ("recall at IoU 0.75", lambda iou: iou >= 0.75),
        "average": (mean, lambda iou: (iou[:, None] >= STEPS - 1e-9).mean(axis=1)),
    }
    row: dict[str, Estimate | None] = {key: share(told(best), groups) for key, (_, told) in verdicts.items()}
    columns = tuple(
        Column(key, title, float(np.mean(told(whole)))) for key, (title, told) in verdicts.items()
    )
    told = (
        f"{len(best):,} objects of {len(searched):,} images of {data.name}, against all boxes of {proposer}, "
        f"{np.mean([found.boxes for found in images]):,.0f} an image. No encoder is asked."
    )
    key, title = f"{data.name}/proposals", f"Framing objects, {data.name}"
    return Table(key, title, told, columns, {proposer: row}, "whole image")


def overlap_of(boxes: Floats, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of boxes [n, 4] with others [m, 4], [n, m]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [np.clip(own[:, 2:] - own[:, :2], 0, None).prod(axis=-1) for own in (boxes, others)]
    return common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-9)
