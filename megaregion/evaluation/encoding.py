"""Scenes through encoders: features of all regions in one pass over the images, and maps of whole scenes.

A map lies on the unit square of a scene that was stretched to a square: that of any encoder has its own h x w
cells, the truth has T x T (TRUTH). Scores, never features, are brought from one to the other.

Shapes: n objects and m words of all scenes, R regions of one, C feature width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megaregion.errors import UserError
from megaregion.evaluation.classifiers import nearest
from megaregion.evaluation.encoders import BoxedImage, Encoder, Features, Floats
from megaregion.evaluation.scenes import TRUTH, Scene, Tokens, Truth, open_image, truth_map

NAMED = 32
"""Most tokens that are named for a word; no word has as many."""
MAPPED_SCENES = 100
"""Most scenes of a split whose maps are kept: they hold every place, not one feature a region."""
COLOURS = 3
BASIS_CELLS = 100_000
"""Cells that a basis is fitted on, evenly strided over all maps."""

Progress = Callable[[str, int, int], None]
"""Called with what is encoded, images done and images in all."""

Item = TypeVar("Item")
Picture = TypeVar("Picture")
Answer = TypeVar("Answer")


def quiet(told: str, done: int, images: int) -> None:
    """Progress that tells nobody."""


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
        groups = [items[start : start + self.size] for start in range(0, len(items), self.size)]
        done, ahead = 0, list[Future[Picture]]()
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            # One batch ahead and no more: thousands of decoded images would not fit into memory.
            for following in (*groups, ()):
                ready, ahead = ahead, [pool.submit(read, item) for item in following]
                if not ready:
                    continue
                with self._timed("read"):
                    pictures = [picture.result() for picture in ready]
                for name, ask in encoders.items():
                    with self._timed(name):
                        answers[name].append(ask(pictures))
                done += len(pictures)
                self.progress(told, done, len(items))
        return answers

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


# ---- regions ---------------------------------------------------------------------------------------


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

    def of_scene(self, encoder: str, place: int) -> Floats:
        """Features of the objects, then the words, of the scene at this place, [R, C]."""
        own = self.features[encoder]
        objects, words = (table.scene == place for table in (self.truth.objects, self.truth.words))
        return np.concatenate([own.objects[objects], own.words[words]])


def encode_scenes(
    truth: Truth, encoders: Sequence[Encoder], batches: Batches, told: str = ""
) -> EncodedScenes:
    """Features of every region by every encoder, whose names are distinct; progress hears what is told.

    Raises:
        UserError: An image cannot be read, has another size than its truth says, or a feature is not finite.
    """
    asks = {encoder.name: encoder.encode for encoder in encoders}
    parts = batches.ask(told, truth.scenes, lambda s: BoxedImage(open_image(s), s.boxes), asks)
    is_word = np.concatenate(
        [np.repeat([False, True], [len(scene.objects), len(scene.words)]) for scene in truth.scenes]
    )
    return EncodedScenes(truth, {own.name: _joined(own, parts[own.name], is_word) for own in encoders})


def _joined(encoder: Encoder, parts: Sequence[Features], is_word: NDArray[np.bool_]) -> SceneFeatures:
    region = np.concatenate([part.region for part in parts])
    if not np.isfinite(region).all():
        raise UserError(f"encoder {encoder.name} gives features that are not finite; the run has diverged")
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    read = None
    if embeddings and encoder.text_centers is not None and is_word.any():
        # Centers of the text head are its classes: the most similar ones are the tokens that it names.
        words = np.concatenate(embeddings)[is_word]
        named = nearest(words, encoder.text_centers, neighbours=NAMED).index
        read = [tuple(token for token in row if token >= 0) for row in named.tolist()]
    return SceneFeatures(region[~is_word], region[is_word], read)


# ---- maps ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MappedScenes:
    """Scenes of one split whose objects all have masks."""

    scenes: Sequence[Scene]
    truths: Sequence[NDArray[np.int16]]
    """The owner of each place of a scene, [T, T]."""
    maps: Mapping[str, Sequence[Floats]]
    """Of each scene by each encoder that has maps, [h, w, C]."""
    regions: Mapping[str, Sequence[Floats]]
    """Features of a scene's objects, then its words, by each encoder, [R, C]."""


def map_scenes(encoded: EncodedScenes, encoders: Sequence[Encoder], batches: Batches) -> MappedScenes:
    """Feature maps, which must be finite, of those of the first scenes whose objects all have masks."""
    scenes = encoded.truth.scenes[:MAPPED_SCENES]
    found = {place: truth_map(scene) for place, scene in enumerate(scenes) if scene.objects}
    truths = {place: truth for place, truth in found.items() if truth is not None}
    masked = [scenes[place] for place in truths]
    asks = {encoder.name: encoder.maps for encoder in encoders}
    answers = batches.ask("maps of", masked, open_image, asks)
    maps = {name: [own for part in parts if part for own in part] for name, parts in answers.items()}
    for name, own in maps.items():
        if not all(np.isfinite(each).all() for each in own):
            raise UserError(f"encoder {name} gives maps that are not finite; the run has diverged")
    maps = {name: own for name, own in maps.items() if own}
    regions = {name: [encoded.of_scene(name, place) for place in truths] for name in encoded.features}
    return MappedScenes(masked, list(truths.values()), maps, regions)


def resized(scores: Floats, side: int = TRUTH) -> Floats:
    """Scores [h, w, K] at the truth's cells or those of another side, [T, T, K], bilinear between middles."""
    planes = torch.from_numpy(np.ascontiguousarray(scores)).permute(2, 0, 1)[None]
    larger = F.interpolate(planes, size=(side, side), mode="bilinear", align_corners=False)
    return larger[0].permute(1, 2, 0).numpy()


def coverage(mask: NDArray[np.bool_], rows: int, columns: int) -> Floats:
    """Share of each of rows x columns cells that a mask [T, T] covers."""
    plane = torch.from_numpy(mask.astype(np.float32))[None, None]
    return F.adaptive_avg_pool2d(plane, (rows, columns))[0, 0].numpy()


def pooled(scene_map: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Mean feature [C] under a mask [T, T], each cell by the share that it covers; zeros for no mask."""
    weight = coverage(mask, *scene_map.shape[:2])
    return np.einsum("hwc,hw->c", scene_map, weight) / np.float32(max(float(weight.sum()), 1e-9))


@dataclass(frozen=True)
class Basis:
    """Three principal directions, fitted once and used for every picture of an encoder."""

    mean: Floats
    """[C]."""
    directions: Floats
    """[C, 3], most variance first."""
    low: Floats
    """Value of each component that is drawn as 0, [3]."""
    high: Floats
    """Value of each component that is drawn as 255, [3]."""
    explained: float
    """Share of the cells' variance that the three hold."""

    def project(self, features: Floats) -> Floats:
        """Components of features [..., C], as [..., 3]."""
        return ((features - self.mean) @ self.directions).astype(np.float32, copy=False)

    def colours(self, components: Floats) -> NDArray[np.uint8]:
        """Components [h, w, 3] as red, green and blue."""
        scaled = (components - self.low) / np.maximum(self.high - self.low, 1e-9)
        return np.asarray((255 * np.clip(scaled, 0, 1)).round(), np.uint8)


def fit_basis(maps: Sequence[Floats]) -> Basis:
    """Fit one basis on the cells of all maps of an encoder, [h, w, C] each."""
    cells = np.concatenate([own.reshape(-1, own.shape[-1]) for own in maps])
    cells = cells[:: max(1, len(cells) // BASIS_CELLS)]
    mean = cells.mean(axis=0)
    centred = (cells - mean).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors[:, ::-1][:, :COLOURS]
    directions = np.pad(directions, ((0, 0), (0, COLOURS - directions.shape[1])))
    # The sign of an eigenvector is chance; fixed so, the same features give the same picture.
    largest = directions[np.abs(directions).argmax(axis=0), range(COLOURS)]
    directions = directions * np.where(largest < 0, -1, 1)
    low, high = np.quantile(centred @ directions, (0.01, 0.99), axis=0)
    explained = float(values[::-1][:COLOURS].sum() / max(values.sum(), 1e-12))
    mean, directions, low, high = (each.astype(np.float32) for each in (mean, directions, low, high))
    return Basis(mean, directions, low, high, explained)
