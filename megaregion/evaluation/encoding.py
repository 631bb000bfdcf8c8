"""One pass over scenes: every image is read once and goes through every encoder.

Shapes: n objects and m words of all scenes, C feature width, E embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, Encoder, Features
from megaregion.evaluation.scenes import Scene


@dataclass(frozen=True)
class SceneFeatures:
    """What one encoder says of a list of scenes; rows as in object_table and word_table."""

    objects: NDArray[np.float32]
    """[n, C]."""
    words: NDArray[np.float32]
    """[m, C]."""
    word_embeddings: NDArray[np.float32] | None
    """[m, E]; None for an encoder without heads."""


def encode_scenes(
    scenes: Sequence[Scene],
    encoders: Sequence[Encoder],
    batch: int,
    workers: int,
    seconds: dict[str, float],
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, SceneFeatures]:
    """Encode every region of the scenes with every encoder.

    Args:
        scenes: Scenes to encode.
        encoders: Encoders with distinct names.
        batch: Images that go through an encoder at once.
        workers: Threads that read and decode the next batch meanwhile.
        seconds: Time spent is added here, under "read" (waiting for images) and each encoder's name.
        progress: Called with the number of images after each batch.

    Returns:
        Features by encoder name.

    Raises:
        UserError: An image is missing, cannot be decoded, or has another size than its truth says.
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
    return {name: _split(features, is_word) for name, features in parts.items()}


def open_image(scene: Scene) -> Image.Image:
    """Read a scene's image as RGB.

    Raises:
        UserError: It is missing, cannot be decoded, or has another size than the truth says.
    """
    try:
        with Image.open(scene.path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{scene.path} cannot be read ({error}); make the scenes again") from None
    if image.size != (scene.width, scene.height):
        raise UserError(
            f"{scene.path} has {image.width} x {image.height} pixels, its truth says "
            f"{scene.width} x {scene.height}; make the scenes again"
        )
    return image


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


def _split(parts: Sequence[Features], is_word: NDArray[np.bool_]) -> SceneFeatures:
    region = np.concatenate([part.region for part in parts])
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    return SceneFeatures(
        objects=region[~is_word],
        words=region[is_word],
        word_embeddings=np.concatenate(embeddings)[is_word] if embeddings else None,
    )
