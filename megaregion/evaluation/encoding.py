"""Scenes through encoders: features of all regions in one pass over the images, and maps of whole scenes.

A map lies on the unit square of a scene that was stretched to a square: that of any encoder has its own h x w
cells, the truth has TRUTH x TRUTH. Scores, never features, are brought from one to the other.

Shapes: n objects and m words of all scenes, C feature width; h x w cells of a map, T x T cells of the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoders import BoxedImage, Encoder, Features
from megaregion.evaluation.scenes import TRUTH, Scene, Truth, TruthMap, open_image
from megaregion.evaluation.vocabulary import NAMED, Tokens

SceneMap = NDArray[np.float32]
"""Features of one image, [h, w, C]."""

Progress = Callable[[str, int, int], None]
"""Called with what is encoded, images done and images in all."""


@dataclass(frozen=True)
class SceneFeatures:
    """What one encoder says of a list of scenes; rows as in object_table and word_table."""

    objects: NDArray[np.float32]
    """[n, C]."""
    words: NDArray[np.float32]
    """[m, C]."""
    read: list[Tokens] | None = None
    """Tokens that the text head names for each word, most similar first; None without a text head."""


@dataclass(frozen=True)
class EncodedScenes:
    """The scenes of one split, and what each encoder says of them, by its name."""

    truth: Truth
    features: Mapping[str, SceneFeatures]


@dataclass(frozen=True)
class MappedScenes:
    """Scenes of one split with their truth, and their maps by the name of each encoder that has them."""

    scenes: Sequence[Scene]
    truths: Sequence[TruthMap]
    maps: Mapping[str, Sequence[SceneMap]]


def encode_scenes(
    scenes: Sequence[Scene],
    encoders: Sequence[Encoder],
    batch: int,
    workers: int,
    seconds: dict[str, float],
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, SceneFeatures]:
    """Features of every region by every encoder, by its name.

    Args:
        scenes: What is encoded.
        encoders: Their names are distinct.
        batch: Images that go through an encoder at once.
        workers: Threads that read and decode the next batch meanwhile.
        seconds: Time spent is added here, under "read" (waiting for images) and each encoder's name.
        progress: Called with the number of images after each batch.

    Raises:
        UserError: An image is missing, cannot be decoded, or has another size than its truth says; or a
            feature is not finite.
    """
    parts: dict[str, list[Features]] = {encoder.name: [] for encoder in encoders}
    start = time.perf_counter()
    for images in _read_ahead(scenes, batch, workers):
        start = _add(seconds, "read", start)
        for encoder in encoders:
            parts[encoder.name].append(encoder.encode(images))
            start = _add(seconds, encoder.name, start)
        progress(len(images))
    is_word = np.concatenate(
        [np.repeat([False, True], [len(scene.objects), len(scene.words)]) for scene in scenes]
    )
    return {encoder.name: _joined(encoder, parts[encoder.name], is_word) for encoder in encoders}


def encode_maps(
    scenes: Sequence[Scene],
    encoders: Sequence[Encoder],
    batch: int,
    seconds: dict[str, float],
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, list[SceneMap]]:
    """Feature maps of every scene by every encoder that has them; arguments as in :func:`encode_scenes`.

    Raises:
        UserError: A feature is not finite.
    """
    maps: dict[str, list[SceneMap]] = {}
    for start in range(0, len(scenes), batch):
        images = [open_image(scene) for scene in scenes[start : start + batch]]
        for encoder in encoders:
            began = time.perf_counter()
            found = encoder.maps(images)
            _add(seconds, encoder.name, began)
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


def counter(progress: Progress, told: str, images: int) -> Callable[[int], None]:
    """Adds up the images of batches and tells ``progress`` of them."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        progress(told, done, images)

    return count


def _read_ahead(scenes: Sequence[Scene], batch: int, workers: int) -> Iterator[list[BoxedImage]]:
    groups = [scenes[start : start + batch] for start in range(0, len(scenes), batch)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        # One batch ahead and no more: thousands of decoded images would not fit into memory.
        ahead = [pool.submit(_boxed, scene) for scene in groups[0]] if groups else []
        for following in [*groups[1:], []]:
            ready, ahead = ahead, [pool.submit(_boxed, scene) for scene in following]
            yield [item.result() for item in ready]


def _boxed(scene: Scene) -> BoxedImage:
    return BoxedImage(open_image(scene), scene.boxes)


def _add(seconds: dict[str, float], name: str, start: float) -> float:
    now = time.perf_counter()
    seconds[name] = seconds.get(name, 0.0) + now - start
    return now


def _joined(encoder: Encoder, parts: Sequence[Features], is_word: NDArray[np.bool_]) -> SceneFeatures:
    region = np.concatenate([part.region for part in parts])
    if not np.isfinite(region).all():
        raise UserError(f"encoder {encoder.name} gives features that are not finite; the run has diverged")
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    read = None
    if embeddings and encoder.text_centers is not None and is_word.any():
        words = np.concatenate(embeddings)[is_word]
        # Centers of the text head are its classes: the most similar ones are the tokens that it names.
        named = nearest(words, encoder.text_centers, neighbours=NAMED).index
        read = [tuple(token for token in row if token >= 0) for row in named.tolist()]
    return SceneFeatures(region[~is_word], region[is_word], read)
