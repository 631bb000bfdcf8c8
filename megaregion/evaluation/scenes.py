"""Scenes with known truth: what is in each image, where, and which tokens its words are made of.

Shapes: R regions of a table, T x T places of a scene that was stretched to a square (T = TRUTH).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sentencepiece import SentencePieceProcessor

from megaregion.data.image import to_rgb
from megaregion.data.info import TOKENIZER_NAME, load_tokenizer, token_set
from megaregion.data.sample import RLE, BadSample, Box, decode_mask, parse_sample
from megaregion.data.shards import ShardedDataset
from megaregion.errors import UserError

TRUTH = 96
"""Cells along each side of the truth: scenes have some 256 pixels, maps 12 to 37 cells."""
IGNORED = -1
"""Owner of a place that belongs to a word: neither object nor background."""
TOP = 5
"""Tokens that count where a word's are recalled."""
NAMED = 32
"""Most tokens that are named for a word; no word has as many."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

Tokens = tuple[int, ...]


# ---- what is known of a scene ----------------------------------------------------------------------


@dataclass(frozen=True)
class TrueObject:
    """An object that stands in a scene; its box is in pixels, x1 and y1 exclusive."""

    name: str
    instance: str
    box: Box
    mask: RLE | None = None
    """What is seen of it, where the truth says so."""


@dataclass(frozen=True)
class TrueWord:
    """A word that is written in a scene; its box is in pixels, x1 and y1 exclusive."""

    text: str
    box: Box


@dataclass(frozen=True)
class Scene:
    """One image and everything that is known to be in it."""

    key: str
    path: Path
    width: int
    height: int
    objects: tuple[TrueObject, ...]
    words: tuple[TrueWord, ...]

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes of the objects, then of the words, [objects + words, 4]."""
        boxes = [item.box for item in self.objects] + [item.box for item in self.words]
        return np.asarray(boxes, np.float32).reshape(-1, 4)


@dataclass(frozen=True)
class RegionTable:
    """Regions of many scenes as columns; row r is a box of scene ``scene[r]``."""

    names: tuple[str, ...]
    """Class of each object or text of each word, R of them."""
    boxes: NDArray[np.float32]
    """[R, 4] in pixels."""
    scene: NDArray[np.int64]
    """[R], the scene's place in the list that the table was made from."""
    instances: tuple[str, ...]
    """The cut-out that each object shows, or the text again for words, R of them."""

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Truth:
    """What is known of the scenes of one split."""

    scenes: Sequence[Scene]
    tokens: tuple[Tokens, ...] = ()
    """Gold tokens of each word, in the order of ``words``; all empty without a tokenizer."""

    @cached_property
    def objects(self) -> RegionTable:
        """All objects, scene by scene."""
        return _table([[(item.name, item.instance, item.box) for item in s.objects] for s in self.scenes])

    @cached_property
    def words(self) -> RegionTable:
        """All words, scene by scene."""
        return _table([[(item.text, item.text, item.box) for item in s.words] for s in self.scenes])


def _table(rows: Sequence[Sequence[tuple[str, str, Box]]]) -> RegionTable:
    flat = [region for regions in rows for region in regions]
    return RegionTable(
        names=tuple(name for name, _, _ in flat),
        instances=tuple(instance for _, instance, _ in flat),
        boxes=np.asarray([box for _, _, box in flat], np.float32).reshape(-1, 4),
        scene=np.repeat(np.arange(len(rows), dtype=np.int64), [len(regions) for regions in rows]),
    )


@dataclass(frozen=True)
class TruthMap:
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


def truth_map(scene: Scene) -> TruthMap | None:
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
    return TruthMap(owner, tuple(item.name for item in scene.objects))


# ---- the files -------------------------------------------------------------------------------------


def read_scenes(folder: Path) -> list[Scene]:
    """Read one split of a scene set, a folder with truth.jsonl and images/ as tools/make_scenes.py writes it.

    Raises:
        UserError: The file is missing or empty, or a line of it is not a scene.
    """
    path = folder / "truth.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist; tools/make_scenes.py writes it")
    scenes = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            scenes.append(_parse_scene(json.loads(line), folder))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} line {number} is not a scene ({reason}); make the scenes again"
            ) from None
    if not scenes:
        raise UserError(f"{path} is empty; make the scenes again with tools/make_scenes.py")
    return scenes


def pick_scenes(scenes: Sequence[Scene], regions: int, seed: int) -> list[Scene]:
    """Draw whole scenes, in their order, until they hold this many objects; 0 takes all.

    No image is read for one box; a larger wish only adds scenes to those of the same seed.
    """
    if regions <= 0:
        return list(scenes)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(scenes))
    held = np.cumsum([len(scenes[i].objects) for i in order])
    drawn = int(np.searchsorted(held, regions)) + 1
    return [scenes[i] for i in sorted(order[:drawn])]


def open_image(scene: Scene) -> Image.Image:
    """Read a scene's image as RGB.

    Raises:
        UserError: It is missing, cannot be decoded, or has another size than the truth says.
    """
    image = read_image(scene.path, "make the scenes again")
    if image.size != (scene.width, scene.height):
        raise UserError(
            f"{scene.path} has {image.width} x {image.height} pixels, its truth says "
            f"{scene.width} x {scene.height}; make the scenes again"
        )
    return image


def read_image(path: Path, advice: str) -> Image.Image:
    """Read an image as RGB.

    Raises:
        UserError: It is missing or cannot be decoded; the text ends with this advice.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}); {advice}") from None


def _parse_scene(line: Mapping[str, Any], folder: Path) -> Scene:
    width, height = int(line["width"]), int(line["height"])
    return Scene(
        key=str(line["key"]),
        path=folder / "images" / f"{line['key']}.jpg",
        width=width,
        height=height,
        objects=tuple(
            TrueObject(
                name=str(item["class"]),
                instance=str(item.get("instance", "")),
                box=_parse_box(item["box"], width, height),
                mask=_parse_mask(item.get("mask"), width, height),
            )
            for item in line["objects"]
        ),
        words=tuple(
            TrueWord(text=str(item["text"]), box=_parse_box(item["box"], width, height))
            for item in line["words"]
        ),
    )


def _parse_mask(values: Mapping[str, Any] | None, width: int, height: int) -> RLE | None:
    if values is None:
        return None
    rle = RLE((int(values["size"][0]), int(values["size"][1])), tuple(int(run) for run in values["counts"]))
    if rle.size != (height, width):
        raise ValueError(f"mask of {rle.size[1]} x {rle.size[0]} pixels in a scene of {width} x {height}")
    return rle


def _parse_box(values: Sequence[float], width: int, height: int) -> Box:
    x0, y0, x1, y1 = (float(value) for value in values)
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x0 >= x1 or y0 >= y1:
        raise ValueError(f"box {values} has no area")
    # Half a pixel of slack: truth that was measured on a rotated word may touch the border from outside.
    if x0 < -0.5 or y0 < -0.5 or x1 > width + 0.5 or y1 > height + 0.5:
        raise ValueError(f"box {values} leaves its image of {width} x {height}")
    return x0, y0, x1, y1


# ---- tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the prior of its tokens."""

    processor: SentencePieceProcessor
    prior: Tokens
    """The five tokens that most text regions of the training shards hold."""

    def tokens(self, text: str) -> Tokens:
        """Gold tokens of a text, by curation's own rule."""
        return token_set(self.processor, text)

    def pieces(self, tokens: Tokens) -> list[str]:
        """Tokens as they are spelled."""
        return [str(self.processor.id_to_piece(token)) for token in tokens]


def open_vocabulary(shards: ShardedDataset, trained_on: Mapping[str, Any]) -> Vocabulary | None:
    """Open a dataset's tokenizer and count its tokens; None for a dataset without text.

    ``trained_on`` is the dataset's description in the checkpoint's manifest.

    Raises:
        UserError: The tokenizer cannot be read, or is not the one that the run was trained with.
    """
    if shards.info.text_classes == 0:
        return None
    expected = trained_on.get("tokenizer_sha256")
    if expected is not None and expected != shards.info.tokenizer_sha256:
        raise UserError(
            f"{shards.folder / TOKENIZER_NAME} is not the tokenizer that the run was trained with; name the "
            "run's dataset with --dataset"
        )
    processor = load_tokenizer(shards.folder / TOKENIZER_NAME)
    return Vocabulary(processor, frequent_tokens(_text_regions(shards)))


def frequent_tokens(regions: Iterable[Tokens]) -> Tokens:
    """The five tokens that most regions hold, given each one's distinct tokens; ties go to the smaller id."""
    counts = Counter(token for tokens in regions for token in tokens)
    return tuple(sorted(counts, key=lambda token: (-counts[token], token))[:TOP])


def _text_regions(shards: ShardedDataset) -> Iterator[Tokens]:
    for index in range(len(shards)):
        try:
            record = parse_sample(shards.read(index).record)
        except BadSample:
            continue  # Training skips it too.
        for region in record.regions:
            if region.kind == "text":
                yield region.labels
