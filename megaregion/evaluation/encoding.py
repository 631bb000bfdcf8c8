"""One pass over scenes: every image is read once and goes through every encoder.

Shapes: n objects and m words of all scenes, C feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, Encoder, Features
from megaregion.evaluation.knn import nearest
from megaregion.evaluation.scenes import Scene, Truth, open_image
from megaregion.evaluation.vocabulary import NAMED, Tokens

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
