"""Feature maps of whole scenes, and what is truly where in them.

Everything lies on the unit square of a scene that was stretched to a square: a map of any encoder has its
own h x w cells, the truth has TRUTH x TRUTH. Scores, never features, are brought from one to the other.

Shapes: C channels, h x w cells of a map, T x T cells of the truth (T = TRUTH).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megaregion.data.sample import decode_mask
from megaregion.errors import UserError
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.encoding import open_image
from megaregion.evaluation.scenes import Scene

TRUTH = 96
"""Cells along each side of the truth: scenes have some 256 pixels, maps 12 to 37 cells."""
IGNORED = -1
"""Owner of a place that belongs to a word: neither object nor background."""

SceneMap = NDArray[np.float32]
"""Features of one image, [h, w, C]."""


@dataclass(frozen=True)
class SceneTruth:
    """What is where in one scene."""

    owner: NDArray[np.int16]
    """[T, T]: 0 background, 1 + the object's place in the scene, IGNORED under words."""
    names: tuple[str, ...]
    """Class of each object."""

    def labels(self, classes: Sequence[str]) -> NDArray[np.int16]:
        """Class of each cell, [T, T]: 0 background, 1 + place in ``classes``, IGNORED for any other."""
        numbers = {name: place + 1 for place, name in enumerate(classes)}
        table = [0, *(numbers.get(name, IGNORED) for name in self.names), IGNORED]
        return np.asarray(table, np.int16)[self.owner]


def read_truth(scene: Scene) -> SceneTruth | None:
    """What is where in a scene; None if an object of it has no mask."""
    height, width = scene.height, scene.width
    rows = ((np.arange(TRUTH) + 0.5) / TRUTH * height).astype(np.int64)
    columns = ((np.arange(TRUTH) + 0.5) / TRUTH * width).astype(np.int64)
    owner = np.zeros((TRUTH, TRUTH), np.int16)
    for word in scene.words:
        x0, y0, x1, y1 = word.box
        owner[np.ix_((rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1))] = IGNORED
    for number, item in enumerate(scene.objects, start=1):
        if item.mask is None:
            return None
        owner[decode_mask(item.mask)[np.ix_(rows, columns)]] = number
    return SceneTruth(owner, tuple(item.name for item in scene.objects))


def encode_maps(
    scenes: Sequence[Scene],
    encoders: Sequence[Encoder],
    batch: int,
    seconds: dict[str, float],
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, list[SceneMap]]:
    """Feature maps of every scene by every encoder that has them.

    Args:
        scenes: Scenes to encode.
        encoders: Encoders with distinct names.
        batch: Images that go through an encoder at once.
        seconds: Time spent is added here, under each encoder's name.
        progress: Called with the number of images after each batch.

    Raises:
        UserError: A feature is not finite.
    """
    maps: dict[str, list[SceneMap]] = {}
    for start in range(0, len(scenes), batch):
        images = [open_image(scene) for scene in scenes[start : start + batch]]
        for encoder in encoders:
            began = time.perf_counter()
            found = encoder.maps(images)
            seconds[encoder.name] = seconds.get(encoder.name, 0.0) + time.perf_counter() - began
            if found is None:
                continue
            if not all(np.isfinite(own).all() for own in found):
                raise UserError(
                    f"encoder {encoder.name} gives maps that are not finite; the run has diverged"
                )
            maps.setdefault(encoder.name, []).extend(found)
        progress(len(images))
    return maps


def resized(scores: NDArray[np.float32], rows: int = TRUTH, columns: int = TRUTH) -> NDArray[np.float32]:
    """Scores [h, w, K] at another number of cells, [rows, columns, K], bilinear between cell middles."""
    planes = torch.from_numpy(np.ascontiguousarray(scores)).permute(2, 0, 1)[None]
    larger = F.interpolate(planes, size=(rows, columns), mode="bilinear", align_corners=False)
    array: NDArray[np.float32] = larger[0].permute(1, 2, 0).numpy()
    return array


def coverage(mask: NDArray[np.bool_], rows: int, columns: int) -> NDArray[np.float32]:
    """Share of each of rows x columns cells that a mask [T, T] covers."""
    plane = torch.from_numpy(mask.astype(np.float32))[None, None]
    array: NDArray[np.float32] = F.adaptive_avg_pool2d(plane, (rows, columns))[0, 0].numpy()
    return array


def pooled(scene_map: SceneMap, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mean feature [C] under a mask [T, T], each cell by the share that it covers; zeros for no mask."""
    weight = coverage(mask, *scene_map.shape[:2])
    total = float(weight.sum())
    mean: NDArray[np.float32] = np.einsum("hwc,hw->c", scene_map, weight) / np.float32(max(total, 1e-9))
    return mean


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [..., C] at length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: NDArray[np.float32] = vectors / np.maximum(length, 1e-12)
    return scaled
