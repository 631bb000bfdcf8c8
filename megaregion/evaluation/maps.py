"""Feature maps of whole scenes, and the places of the truth that their cells cover.

Everything lies on the unit square of a scene that was stretched to a square: a map of any encoder has its
own h x w cells, the truth has TRUTH x TRUTH. Scores, never features, are brought from one to the other.

Shapes: C channels, h x w cells of a map, T x T cells of the truth (T = TRUTH).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.encoders import Encoder
from megaregion.evaluation.scenes import TRUTH, Scene, TruthMap, open_image

SceneMap = NDArray[np.float32]
"""Features of one image, [h, w, C]."""


@dataclass(frozen=True)
class MappedScenes:
    """Scenes of one split with their truth, and their maps by the name of each encoder that has them."""

    scenes: Sequence[Scene]
    truths: Sequence[TruthMap]
    maps: Mapping[str, Sequence[SceneMap]]


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
