"""Scenes through encoders: features of all regions in one pass over the images, and maps of whole scenes.

A map lies on the unit square of a scene that was stretched to a square: that of any encoder has its own h x w
cells, the truth has TRUTH x TRUTH. Scores, never features, are brought from one to the other.

Shapes: n objects and m words of all scenes, C feature width; h x w cells of a map, T x T cells of the truth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoders import BoxedImage, Encoder, Features, Floats
from megaregion.evaluation.scenes import NAMED, TRUTH, Scene, Tokens, Truth, TruthMap, open_image, truth_map

MAPPED_SCENES = 100
"""Most scenes of a split whose maps are kept: they hold every place, not one feature a region."""

Progress = Callable[[str, int, int], None]
"""Called with what is encoded, images done and images in all."""


def quiet(told: str, done: int, images: int) -> None:
    """Progress that tells nobody."""


Item = TypeVar("Item")
Picture = TypeVar("Picture")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class SceneFeatures:
    """What one encoder says of the scenes of a split; rows as in the tables of their truth."""

    objects: Floats
    """[n, C]."""
    words: Floats
    """[m, C]."""
    read: list[Tokens] | None = None
    """Tokens that the text head names for each word, most similar first; None without a text head."""


@dataclass(frozen=True)
class EncodedScenes:
    """The scenes of one split, and what each encoder says of them, by its name."""

    truth: Truth
    features: Mapping[str, SceneFeatures]

    def by_scene(self, scenes: Sequence[Scene]) -> dict[str, list[Floats]]:
        """Features of each of these scenes' objects, then words, [R, C], by encoder."""
        place = {scene.key: number for number, scene in enumerate(self.truth.scenes)}
        objects, words = ([table.scene == place[scene.key] for scene in scenes]
                          for table in (self.truth.objects, self.truth.words))  # fmt: skip
        return {
            name: [
                np.concatenate([own.objects[o], own.words[w]]) for o, w in zip(objects, words, strict=True)
            ]
            for name, own in self.features.items()
        }


@dataclass(frozen=True)
class MappedScenes:
    """Scenes of one split with their truth, and their maps by the name of each encoder that has them."""

    scenes: Sequence[Scene]
    truths: Sequence[TruthMap]
    maps: Mapping[str, Sequence[Floats]]
    """Of each scene, [h, w, C]."""


@dataclass(frozen=True)
class Batches:
    """How images go through encoders: a batch at a time, while threads read and decode the next one."""

    size: int = 32
    workers: int = 1
    """Threads that read."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent is added here, under "read" (waiting for images) and each encoder's name."""
    progress: Progress = quiet

    def ask(
        self,
        told: str,
        items: Sequence[Item],
        read: Callable[[Item], Picture],
        encoders: Mapping[str, Callable[[list[Picture]], Answer]],
    ) -> dict[str, list[Answer]]:
        """What each encoder answers to each batch of what is read of the items."""
        answers: dict[str, list[Answer]] = {name: [] for name in encoders}
        done, start = 0, time.perf_counter()
        for pictures in self._read_ahead(items, read):
            start = self._add("read", start)
            for name, ask in encoders.items():
                answers[name].append(ask(pictures))
                start = self._add(name, start)
            done += len(pictures)
            self.progress(told, done, len(items))
        return answers

    def _read_ahead(self, items: Sequence[Item], read: Callable[[Item], Picture]) -> Iterator[list[Picture]]:
        groups = [items[start : start + self.size] for start in range(0, len(items), self.size)]
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            # One batch ahead and no more: thousands of decoded images would not fit into memory.
            ahead: list[Future[Picture]] = []
            for following in (*groups, ()):
                ready, ahead = ahead, [pool.submit(read, item) for item in following]
                if ready:
                    yield [picture.result() for picture in ready]

    def _add(self, name: str, start: float) -> float:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - start
        return now


def encode_scenes(
    truth: Truth, encoders: Sequence[Encoder], batches: Batches, told: str = ""
) -> EncodedScenes:
    """Features of every region by every encoder, whose names are distinct; progress hears what is told.

    Raises:
        UserError: An image is missing, cannot be decoded, or has another size than its truth says; or a
            feature is not finite.
    """
    asks = {encoder.name: encoder.encode for encoder in encoders}
    parts = batches.ask(told, truth.scenes, lambda s: BoxedImage(open_image(s), s.boxes), asks)
    is_word = np.concatenate(
        [np.repeat([False, True], [len(scene.objects), len(scene.words)]) for scene in truth.scenes]
    )
    return EncodedScenes(truth, {own.name: _joined(own, parts[own.name], is_word) for own in encoders})


def map_scenes(scenes: Sequence[Scene], encoders: Sequence[Encoder], batches: Batches) -> MappedScenes:
    """Feature maps by every encoder that has them, of those of the first scenes whose objects all have masks.

    Raises:
        UserError: A feature is not finite.
    """
    found = [(scene, truth_map(scene)) for scene in scenes[:MAPPED_SCENES] if scene.objects]
    masked = [(scene, truth) for scene, truth in found if truth]
    asks = {encoder.name: encoder.maps for encoder in encoders}
    answers = batches.ask("maps of", masked, lambda pair: open_image(pair[0]), asks)
    maps = {name: [own for part in parts if part for own in part] for name, parts in answers.items()}
    for name, own in maps.items():
        if not all(np.isfinite(each).all() for each in own):
            raise UserError(f"encoder {name} gives maps that are not finite; the run has diverged")
    has_maps = {name: own for name, own in maps.items() if own}
    return MappedScenes([scene for scene, _ in masked], [truth for _, truth in masked], has_maps)


def resized(scores: Floats, rows: int = TRUTH, columns: int = TRUTH) -> Floats:
    """Scores [h, w, K] at another number of cells, [rows, columns, K], bilinear between cell middles."""
    planes = torch.from_numpy(np.ascontiguousarray(scores)).permute(2, 0, 1)[None]
    larger = F.interpolate(planes, size=(rows, columns), mode="bilinear", align_corners=False)
    return larger[0].permute(1, 2, 0).numpy()


def coverage(mask: NDArray[np.bool_], rows: int, columns: int) -> Floats:
    """Share of each of rows x columns cells that a mask [T, T] covers."""
    plane = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.adaptive_avg_pool2d(plane, (rows, columns))[0, 0].numpy()


def pooled(scene_map: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Mean feature [C] under a mask [T, T], each cell by the share that it covers; zeros for no mask."""
    weight = coverage(mask, *scene_map.shape[:2])
    return np.einsum("hwc,hw->c", scene_map, weight) / np.float32(max(float(weight.sum()), 1e-9))


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
