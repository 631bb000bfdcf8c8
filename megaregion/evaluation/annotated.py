"""Real images with annotations as scenes: COCO's JSON and a folder of images, cut into known and asked ones.

Crowds name no region; what they cover counts for nothing where places are named. Of objects that overlap, the
smaller one lies on top, as people draw them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from megaregion.data.coco import Category, CocoImage, read_coco, region_of
from megaregion.data.image import to_rgb
from megaregion.data.sample import RLE
from megaregion.errors import UserError
from megaregion.evaluation.scenes import Scene, TrueRegion, Truth, pick_scenes

TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap an image's sides."""
ORIENTATION = 0x0112


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
        annotations: COCO's JSON of what is asked.
        images: Folder of its images.
        train_annotations: JSON of what is known; None halves the images of one file by a hash of their ids.
        train_images: Folder of those images, the same one if None.
        limit: Objects of each part, as whole images that the seed draws; 0 takes all.
        seed: Draws them.

    Raises:
        UserError: A file cannot be used, or one of the parts holds no region.
    """
    left_out: Counter[str] = Counter()
    scenes, named = _read(annotations, images, left_out)
    if train_annotations is None:
        asked = [scene for scene in scenes if _is_asked(scene.key)]
        known = [scene for scene in scenes if not _is_asked(scene.key)]
    else:
        known, also = _read(train_annotations, train_images or images, left_out)
        asked, named = scenes, {**named, **also}
    for part, told in ((known, "to learn from"), (asked, "to ask about")):
        if not part:
            reasons = ", ".join(f"{reason}: {n:,}" for reason, n in left_out.items()) or "it names none"
            raise UserError(
                f"{annotations} leaves no image with regions {told} ({reasons}); look at --images"
            )
    known, asked = (pick_scenes(part, limit, seed) for part in (known, asked))
    frequency = {each.name: each.frequency for each in named.values() if each.frequency}
    return Annotated(annotations.stem, Truth(known), Truth(asked), frequency, left_out)


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
    return hashlib.sha256(key.encode()).digest()[0] < 128


def _read(
    annotations: Path, folder: Path, left_out: Counter[str]
) -> tuple[list[Scene], Mapping[int, Category]]:
    coco = read_coco(annotations)
    left_out.update(coco.dropped)
    scenes = []
    for image in coco.images:
        scene = _scene(image, coco.categories, folder, left_out)
        if not scene.objects:
            left_out["image without regions"] += 1
        elif reason := _misfit(scene):
            left_out[reason] += 1
        else:
            scenes.append(scene)
    return scenes, coco.categories


def _scene(
    image: CocoImage, categories: Mapping[int, Category], folder: Path, left_out: Counter[str]
) -> Scene:
    objects: list[TrueRegion] = []
    crowds: list[RLE] = []
    for row in image.rows:
        try:
            region = region_of(row, image, categories)
        except ValueError as error:
            left_out[str(error)] += 1
            continue
        if region is None:
            left_out["outside the image"] += 1
        elif region.crowd:
            left_out["crowd"] += 1
            crowds += [region.mask] if region.mask is not None else []
        else:
            objects.append(TrueRegion(region.category.name, region.box, image.id, region.mask))
    objects.sort(key=_area, reverse=True)
    path = folder / image.file_name
    if not path.is_file():
        # LVIS names a split's folder, too.
        path = folder / PurePosixPath(image.file_name).name
    return Scene(image.id, path, image.width, image.height, tuple(objects), (), tuple(crowds))


def _area(item: TrueRegion) -> float:
    x0, y0, x1, y1 = item.box
    return (x1 - x0) * (y1 - y0) if item.mask is None else float(sum(item.mask.counts[1::2]))


def _misfit(scene: Scene) -> str:
    """Why a scene cannot be opened, by its file's header; empty if it can."""
    try:
        with Image.open(scene.path) as file:
            turned = file.getexif().get(ORIENTATION, 1) in TURNED
            sizes = [file.size, file.size[::-1]] if turned else [file.size]
    except FileNotFoundError:
        return "image is not there"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "image cannot be read"
    return "" if (scene.width, scene.height) in sizes else "image has another size"
