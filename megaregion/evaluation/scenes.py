"""Scenes with known truth: what is in each image, where, and which tokens its words are made of.

Shapes: R regions of a table, T x T places of a scene that was stretched to a square (T = TRUTH).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sentencepiece import SentencePieceProcessor

from megaregion.data.image import decode_image
from megaregion.data.info import TOKENIZER_NAME, DatasetInfo, load_tokenizer, token_set
from megaregion.data.sample import RLE, BadSample, Box, decode_mask, parse_sample
from megaregion.data.shards import Datasets
from megaregion.errors import UserError

TRUTH = 96
"""Cells along each side of the truth: scenes have some 256 pixels, maps 12 to 37 cells."""
IGNORED = -1
"""Owner of a place that belongs to a word: neither object nor background."""
TOP = 5
"""Tokens that count where a word's are recalled."""
COUNTED = 200_000
"""Most training samples whose tokens are counted, evenly spaced."""
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif")

Tokens = tuple[int, ...]


# ---- what is known of a scene ----------------------------------------------------------------------


@dataclass(frozen=True)
class TrueRegion:
    """An object that stands in a scene, or a word that is written in it."""

    name: str
    """The object's class, or the word."""
    box: Box
    """In pixels, x1 and y1 exclusive."""
    instance: str = ""
    """The cut-out that an object shows."""
    mask: RLE | None = None
    """What is seen of an object, where the truth says so."""


@dataclass(frozen=True)
class Scene:
    """One image and everything that is known to be in it."""

    key: str
    path: Path
    width: int
    height: int
    objects: tuple[TrueRegion, ...]
    words: tuple[TrueRegion, ...]
    unclear: tuple[RLE, ...] = ()
    """What counts for nothing: crowds, whose single objects nobody outlined."""

    @property
    def regions(self) -> tuple[TrueRegion, ...]:
        """The objects, then the words."""
        return (*self.objects, *self.words)

    @cached_property
    def boxes(self) -> NDArray[np.float32]:
        """Boxes of the objects, then of the words, [objects + words, 4]."""
        return np.asarray([region.box for region in self.regions], np.float32).reshape(-1, 4)


@dataclass(frozen=True)
class RegionTable:
    """Regions of many scenes as columns, or whole images, each its own scene."""

    names: Sequence[str]
    """Class of each object or text of each word, R of them."""
    instances: Sequence[str]
    """The thing that each shows (a cut-out, an image): what must not be asked about itself."""
    scene: NDArray[np.int64]
    """[R], the scene's place in the list that the table was made from: what is drawn as a whole."""
    boxes: NDArray[np.float32]
    """[R, 4] in pixels; [0, 4] where nobody cuts them out."""

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
        return _table([scene.objects for scene in self.scenes])

    @cached_property
    def words(self) -> RegionTable:
        """All words, scene by scene."""
        return _table([scene.words for scene in self.scenes])


def _table(rows: Sequence[Sequence[TrueRegion]]) -> RegionTable:
    flat = [region for regions in rows for region in regions]
    return RegionTable(
        names=tuple(region.name for region in flat),
        instances=tuple(region.instance for region in flat),
        scene=np.repeat(np.arange(len(rows), dtype=np.int64), [len(regions) for regions in rows]),
        boxes=np.asarray([region.box for region in flat], np.float32).reshape(-1, 4),
    )


def unboxed(names: Sequence[str], instances: Sequence[str], scene: NDArray[np.int64]) -> RegionTable:
    """A table of what nobody cuts out: whole images, masks."""
    return RegionTable(names, instances, scene, np.zeros((0, 4), np.float32))


def truth_map(scene: Scene, cells: tuple[int, int] = (TRUTH, TRUTH)) -> NDArray[np.int16] | None:
    """The owner of each place of a scene, at these rows and columns; None if an object of it has no mask.

    It is 0 on the background, 1 + the object's place in the scene on an object, IGNORED under words and
    where nothing is clear.
    """
    rows, columns = (
        ((np.arange(count) + 0.5) / count * edge).astype(np.int64)
        for count, edge in zip(cells, (scene.height, scene.width), strict=True)
    )
    owner = np.zeros(cells, np.int16)
    for mask in scene.unclear:
        owner[decode_mask(mask)[np.ix_(rows, columns)]] = IGNORED
    for word in scene.words:
        x0, y0, x1, y1 = word.box
        owner[np.ix_((rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1))] = IGNORED
    for number, item in enumerate(scene.objects, start=1):
        if item.mask is None:
            return None
        owner[decode_mask(item.mask)[np.ix_(rows, columns)]] = number
    return owner


def class_map(scene: Scene, owner: NDArray[np.int16], classes: Sequence[str]) -> NDArray[np.int16]:
    """The class of each place: 0 background, 1 + place in ``classes``, IGNORED for any other."""
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    table = [0, *(numbers.get(item.name, IGNORED) for item in scene.objects), IGNORED]
    return np.asarray(table, np.int16)[owner]


# ---- the files -------------------------------------------------------------------------------------


def read_scenes(folder: Path) -> list[Scene]:
    """Read one split of a scene set, a folder with truth.jsonl and images/ as tools/make_scenes.py writes it.

    Raises:
        UserError: The file is missing or empty, or a line of it is not a scene.
    """
    path = folder / "truth.jsonl"
    if not path.is_file():
        splits = ", ".join(sorted(file.parent.name for file in folder.parent.glob("*/truth.jsonl")))
        found = f"{folder.parent} has only {splits}" if splits else f"{folder.parent} holds no scenes"
        raise UserError(f"{path} does not exist, {found}; see tools/make_scenes.py --help")
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
    """Draw whole scenes until they hold this many objects; 0 takes all; more only adds to the same seed's."""
    if regions <= 0:
        return list(scenes)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(scenes))
    held = np.cumsum([len(scenes[i].objects) for i in order])
    drawn = int(np.searchsorted(held, regions)) + 1
    return [scenes[i] for i in sorted(order[:drawn])]


def open_image(scene: Scene) -> Image.Image:
    """A scene's image, RGB; a UserError where it cannot be read or has another size than the truth says."""
    image = read_image(scene.path, "make the scenes again")
    if image.size != (scene.width, scene.height):
        raise UserError(
            f"{scene.path} has {image.width} x {image.height} pixels, its truth says "
            f"{scene.width} x {scene.height}; make the scenes again"
        )
    return image


def read_image(path: Path, advice: str) -> Image.Image:
    """An image, RGB; a UserError that ends with this advice where it is missing or cannot be decoded."""
    try:
        return decode_image(path.read_bytes())
    except (OSError, BadSample) as error:
        raise UserError(f"{path} cannot be read ({error}); {advice}") from None


def _parse_scene(line: Mapping[str, Any], folder: Path) -> Scene:
    key, width, height = str(line["key"]), int(line["width"]), int(line["height"])
    objects = tuple(
        TrueRegion(
            str(item["class"]),
            _parse_box(item["box"], width, height),
            str(item.get("instance", "")),
            _parse_mask(item.get("mask"), width, height),
        )
        for item in line["objects"]
    )
    words = tuple(
        TrueRegion(str(item["text"]), _parse_box(item["box"], width, height)) for item in line["words"]
    )
    return Scene(key, folder / "images" / f"{key}.jpg", width, height, objects, words)


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
    """A tokenizer, and how often training regions hold its tokens."""

    processor: SentencePieceProcessor
    size: int
    """Its classes, which are the first ones of the text head."""
    counts: Mapping[int, int]
    """Text regions that hold each token, by its id, in the counted samples; a token that none holds lacks."""
    counted: int
    """Samples of the training shards that were counted, evenly strided; at most COUNTED."""
    unreadable: int
    """Counted samples whose records cannot be read."""

    @property
    def prior(self) -> Tokens:
        """The five tokens that most text regions hold."""
        return most_frequent(self.counts)

    def tokens(self, text: str) -> Tokens:
        """Gold tokens of a text, by curation's own rule."""
        return token_set(self.processor, text)

    def pieces(self, tokens: Tokens) -> list[str]:
        """Tokens as they are spelled."""
        return [str(self.processor.id_to_piece(token)) for token in tokens]


def check_labels(found: DatasetInfo, trained_on: Mapping[str, Any], path: str) -> None:
    """Refuse shards at a path whose centers or tokenizers are not those of the run's manifest."""
    for key, name in (("centers_sha256", "centers are"), ("tokenizer_sha256", "tokenizer is")):
        expected = trained_on.get(key)
        if expected is not None and expected != getattr(found, key):
            raise UserError(
                f"the {name} not what the run was trained with in {path}; name the run's shards with "
                "--dataset, as its data.path names them"
            )


def open_vocabulary(datasets: Datasets) -> Vocabulary | None:
    """Open the tokenizer and count its tokens; of several, the first one's. None where there is no text.

    Raises:
        UserError: The tokenizer cannot be read.
    """
    part = next((part for part in datasets.parts if part.info.text_classes), None)
    if part is None:
        return None
    processor, size = load_tokenizer(part.folder / TOKENIZER_NAME), part.info.text_classes
    counts, unreadable = Counter[int](), 0
    counted = np.linspace(0, len(datasets) - 1, min(len(datasets), COUNTED)).round().astype(np.int64)
    for index in counted.tolist():
        raw = datasets.read(index)
        try:
            record = datasets.labelled(index, raw.key, parse_sample(raw.record))
        except BadSample:
            unreadable += 1  # Training skips it too.
            continue
        texts = (region for region in record.regions if region.kind == "text")
        counts.update(token for region in texts for token in region.labels if token < size)
    return Vocabulary(processor, size, counts, len(counted), unreadable)


def most_frequent(counts: Mapping[int, int]) -> Tokens:
    """The five tokens that most regions hold; of equally many, the smaller id stands first."""
    return tuple(sorted(counts, key=lambda token: (-counts[token], token))[:TOP])
