"""Real images with annotations as scenes, in any format that curation reads, cut into known and asked ones.

Crowds name no region; what they cover counts for nothing where places are named. Of objects that overlap, the
smaller one lies on top, as people draw them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from megaregion.data.coco import Unusable, region_of
from megaregion.data.formats import Category, Entry, Named, Row, plain_text, read_dataset, read_labels
from megaregion.data.image import to_rgb
from megaregion.data.sample import RLE
from megaregion.errors import UserError
from megaregion.evaluation.scenes import IMAGE_ENDINGS, Scene, TrueRegion, Truth, pick_scenes

LABELS = (".txt", ".xml", ".json")
"""Endings of YOLO's, Pascal VOC's and SA-1B's label files."""
CLASS_FILES = "class-descriptions*.csv"
"""Where Open Images names its classes, beside its boxes."""
KNOWN = (
    "name a JSON of COCO, LVIS or Objects365, a CSV of Open Images, a metadata.jsonl or .csv, or the folder "
    "of YOLO's, Pascal VOC's or SA-1B's label files"
)


@dataclass(frozen=True)
class Annotated:
    """Images with known regions, in two parts without a common image."""

    name: str
    """Of the annotation file, without its ending."""
    known: Truth
    """What classifiers learn from: objects are named by their category, their instance is their image."""
    asked: Truth
    frequency: Mapping[str, str] = field(default_factory=dict)
    """Of each class, as LVIS has it: r, c or f."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Images and rows that are not asked about, by reason."""

    @property
    def named(self) -> bool:
        """Whether objects have classes; SA-1B's have none."""
        return any(self.known.objects.names)

    @property
    def masks(self) -> bool:
        """Whether every object has a mask."""
        scenes = (*self.known.scenes, *self.asked.scenes)
        return all(item.mask is not None for scene in scenes for item in scene.objects)


def read_annotated(
    annotations: Path,
    images: Path,
    train_annotations: Path | None = None,
    train_images: Path | None = None,
    limit: int = 0,
    seed: int = 0,
) -> Annotated:
    """Read what is asked, and what is known of other images.

    Args:
        annotations: What is asked: a JSON of COCO, LVIS or Objects365, Open Images' CSV, imagefolder's
            metadata, or a folder of label files as YOLO, Pascal VOC and SA-1B have them.
        images: Folder of its images.
        train_annotations: What is known, likewise; None halves the images by a hash of their ids.
        train_images: Folder of those images, the same one if None.
        limit: Objects of each part, as whole images that the seed draws; 0 takes all.
        seed: Draws them.

    Raises:
        UserError: A file cannot be used, or one of the parts holds no region.
    """
    left_out: Counter[str] = Counter()
    scenes, frequency = _read(annotations, images, left_out)
    if train_annotations is None:
        asked = [scene for scene in scenes if _is_asked(scene.key)]
        known = [scene for scene in scenes if not _is_asked(scene.key)]
    else:
        known, also = _read(train_annotations, train_images or images, left_out)
        asked, frequency = scenes, frequency | also
    for part, told in ((known, "to learn from"), (asked, "to ask about")):
        if not part:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in (+left_out).items()) or "it names none"
            raise UserError(
                f"{annotations} leaves no image with regions {told} ({reasons}); look at --images"
            )
    known, asked = (pick_scenes(part, limit, seed) for part in (known, asked))
    return Annotated(annotations.stem, Truth(known), Truth(asked), frequency, +left_out)


def open_scene(scene: Scene) -> Image.Image:
    """The image of a scene, RGB, with the sides that its annotations speak of.

    Raises:
        UserError: It cannot be decoded.
    """
    try:
        with Image.open(scene.path) as file:
            upright = file if file.size == (scene.width, scene.height) else ImageOps.exif_transpose(file)
            return to_rgb(upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        advice = "remove it from the folder: images that are not there are counted and left out"
        raise UserError(f"{scene.path} cannot be read ({error}); {advice}") from None


def _is_asked(key: str) -> bool:
    return hashlib.sha256(os.fsencode(key)).digest()[0] < 128  # A path may hold bytes that are no text.


class _Said(NamedTuple):
    """What annotations say of one image."""

    key: str
    path: Path
    size: tuple[int, int]
    """Width and height; 0 where they do not say."""
    rows: Iterable[tuple[str | None, dict[str, Any]]]
    """Class, None for an unknown one, and what the row says."""


def _read(annotations: Path, folder: Path, left_out: Counter[str]) -> tuple[list[Scene], dict[str, str]]:
    """The scenes of a file or a folder of label files, and how frequent each class is."""
    frequency: dict[str, str] = {}
    if annotations.is_dir():
        images = _of_label_files(annotations, folder, left_out)
    else:
        images = _of_dataset(annotations, folder, left_out, frequency)
    scenes = []
    for said in images:
        try:
            scene = _scene(said, left_out)
        except Unusable as why:
            left_out[str(why)] += 1
            continue
        left_out["image without regions"] += not scene.objects
        scenes += [scene] if scene.objects else []
    return scenes, frequency


def _of_label_files(place: Path, folder: Path, left_out: Counter[str]) -> Iterator[_Said]:
    """The images of a folder that have a label file, at the same path below its place or at the top of it."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_ENDINGS:
            continue
        inner = path.relative_to(folder)
        files = (place / near.with_suffix(kind) for near in (inner, Path(inner.name)) for kind in LABELS)
        found = next(filter(None, (read_labels(file) for file in files if file.is_file())), None)
        if found is None:
            left_out["image without annotations"] += 1
        else:
            rows = [(str(row.get("class", "")), row) for row in found[2]]
            yield _Said(inner.with_suffix("").as_posix(), path, found[1], rows)


def _of_dataset(
    file: Path, folder: Path, left_out: Counter[str], frequency: dict[str, str]
) -> Iterator[_Said]:
    """The images that a file names; of their rows in JSON only the places are kept, until each is read."""
    images: dict[str, Named] = {}
    rows: dict[str, list[tuple[str, bytes | int, int]]] = {}
    classes: dict[str, str] = {}
    try:
        for entry in _entries(file):
            match entry:
                case Row(image, category, content, size):
                    rows.setdefault(image, []).append((sys.intern(category), content, size))
                case Named(image):
                    key = plain_text(image)
                    left_out["image named twice"] += key in images
                    images.setdefault(key, entry)
                case Category(category, name, often):
                    classes[category] = name
                    frequency |= {name: often} if often else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())}); {KNOWN}") from None
    if not images:
        raise UserError(f"{file} names no images; {KNOWN}")
    left_out["row of an unknown image"] += sum(len(rows[key]) for key in rows.keys() - images.keys())
    with file.open("rb") as stream:

        def read(category: str, content: bytes | int, size: int) -> tuple[str | None, dict[str, Any]]:
            said = os.pread(stream.fileno(), size, content) if isinstance(content, int) else content
            return classes.get(category) if classes else category, json.loads(said)

        for key, (_, name, width, height) in images.items():
            own = (read(*row) for row in rows.pop(key, ()))
            yield _Said(key, _find(folder, name), (width, height), own)


def _entries(file: Path) -> Iterator[Entry]:
    """What a file says, and what is said of Open Images' classes beside it."""
    if (yield from read_dataset(file)) == "Open Images":
        yield from chain.from_iterable(map(read_dataset, sorted(file.parent.glob(CLASS_FILES))))


def _find(folder: Path, name: str) -> Path:
    """An image by the name that annotations give it; LVIS names a split's folder, Open Images no ending."""
    last = PurePosixPath(name).name
    places = [folder / name, folder / last, *(folder / f"{last}{ending}" for ending in IMAGE_ENDINGS)]
    return next((path for path in places if path.is_file()), places[0])


def _scene(said: _Said, left_out: Counter[str]) -> Scene:
    width, height = _sides(said)
    objects: list[TrueRegion] = []
    crowds: list[RLE] = []
    for name, row in said.rows:
        try:
            if name is None:
                raise Unusable("unknown class")
            box, mask, boxed = region_of(row, width, height)
            if boxed:
                raise Unusable("shape that cannot be used")
        except Unusable as why:
            left_out[str(why)] += 1
            continue
        # 4 bytes a run: a tuple takes 40.
        mask = mask and replace(mask, counts=array("I", mask.counts))
        if row.get("iscrowd"):
            left_out["crowd"] += 1
            crowds += [mask] if mask else []
        else:
            objects.append(TrueRegion(name, box, said.key, mask))
    objects.sort(key=_area, reverse=True)
    return Scene(said.key, said.path, width, height, tuple(objects), (), tuple(crowds))


def _area(item: TrueRegion) -> float:
    x0, y0, x1, y1 = item.box
    return (x1 - x0) * (y1 - y0) if item.mask is None else float(sum(item.mask.counts[1::2]))


def _sides(said: _Said) -> tuple[int, int]:
    """Width and height that annotations speak of; those of the stored image where they do not say."""
    try:
        with Image.open(said.path) as file:
            turned = file.getexif().get(0x0112) in (5, 6, 7, 8)  # Orientations that swap its sides.
            sizes = [file.size, file.size[::-1]] if turned else [file.size]
    except FileNotFoundError:
        raise Unusable("image is not there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unusable("image cannot be read") from None
    if all(said.size) and said.size not in sizes:
        raise Unusable("image has another size")
    return said.size if all(said.size) else sizes[0]
