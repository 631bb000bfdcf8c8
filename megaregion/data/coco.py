"""COCO's JSON, as LVIS and Objects365 write it too: one file of boxes, shapes and classes for many images.

    {"images": [{"id": 1, "file_name": "1.jpg", "width": 640, "height": 480}, ...],
     "categories": [{"id": 18, "name": "dog", "frequency": "f"}, ...],
     "annotations": [{"image_id": 1, "category_id": 18, "bbox": [x, y, w, h], "iscrowd": 0,
                      "segmentation": [[x0, y0, x1, y1, ...], ...] or {"size": [h, w], "counts": RLE}}, ...]}

Run lengths are a list or packed into text. A shape of several polygons is their union.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from megaregion.data.sample import RLE, Box
from megaregion.errors import UserError
from megaregion.files import read_json

MAX_SHIFT = 60
"""Bits of a run length before its last character: no image has more pixels, and endless numbers cost time."""
FAR = 10
"""Sides of its image that a polygon may lie away from it: its outline costs memory by its length."""

MAX_OUTLINE = 2**20
"""Pixels along all edges of a shape's polygons, of which each costs pycocotools 80 bytes."""

Row = dict[str, Any]


class Category(NamedTuple):
    """A class of objects."""

    name: str
    frequency: str = ""
    """LVIS: r(are), c(ommon) or f(requent), by the images of its training split; empty elsewhere."""


@dataclass(frozen=True)
class CocoImage:
    """One image and its rows as the file has them; :func:`region_of` reads a row."""

    id: str
    file_name: str
    """Below the folder of images, with / between its parts."""
    width: int
    """In pixels."""
    height: int
    rows: Sequence[Row]


@dataclass(frozen=True)
class Coco:
    """The content of one file."""

    images: Sequence[CocoImage]
    """In the order of the file."""
    categories: Mapping[int, Category]
    dropped: Counter[str]
    """Images and rows that cannot be used at all, by reason."""


class CocoRegion(NamedTuple):
    """What a row says."""

    category: Category
    box: Box
    """x0, y0, x1, y1 in pixels, inside the image."""
    mask: RLE | None
    crowd: bool
    """Whether it covers several objects at once."""


def read_coco(path: Path) -> Coco:
    """Read a file whole.

    Raises:
        UserError: It cannot be read, or is no such file.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); name a COCO JSON") from None
    parts = ("images", "annotations", "categories")
    for part in parts:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{path} holds no list of {part}; name a JSON as COCO and LVIS write them")
    images, rows, named = (content[part] for part in parts)
    dropped: Counter[str] = Counter()
    categories = {}
    for each in named:
        try:
            categories[int(each["id"])] = Category(str(each["name"]), str(each.get("frequency", "")))
        except (KeyError, TypeError, ValueError, AttributeError):
            dropped["category without id and name"] += 1
    by_image: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row, dict) and "image_id" in row:
            by_image.setdefault(str(row["image_id"]), []).append(row)
        else:
            dropped["row without image"] += 1
    found: dict[str, CocoImage] = {}
    for each in images:
        try:
            image = _image(each, by_image)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            dropped["image without id, name and size"] += 1
            continue
        if image.id in found:
            dropped["image named twice"] += 1
        found.setdefault(image.id, image)
    dropped["row of an unknown image"] += sum(len(own) for key, own in by_image.items() if key not in found)
    return Coco(tuple(found.values()), categories, +dropped)


def _image(given: Row, by_image: Mapping[str, Sequence[Row]]) -> CocoImage:
    # LVIS has no file_name: the last two parts of coco_url are the split's folder and the name.
    name = given.get("file_name") or "/".join(PurePosixPath(given["coco_url"]).parts[-2:])
    width, height, key = int(given["width"]), int(given["height"]), str(given["id"])
    if width <= 0 or height <= 0 or not isinstance(name, str):
        raise ValueError("no image has this size")
    return CocoImage(key, name, width, height, by_image.get(key, ()))


def region_of(row: Row, image: CocoImage, categories: Mapping[int, Category]) -> CocoRegion | None:
    """What a row says of its image; None if nothing of it lies inside.

    The box of a row with a shape is the frame of the shape.

    Raises:
        ValueError: It contradicts itself, or the file; the text is a short reason.
    """
    try:
        category = categories[int(row["category_id"])]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("unknown class") from None
    mask = None
    try:
        if row.get("segmentation"):
            mask = mask_of(row["segmentation"], image.height, image.width)
        box = clipped(row["bbox"], image.width, image.height) if mask is None else frame(mask)
        crowd = bool(int(row.get("iscrowd") or 0))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError("bad annotation") from None
    return None if box is None else CocoRegion(category, box, mask, crowd)


# ---- shapes ----------------------------------------------------------------------------------------


def mask_of(segmentation: Any, height: int, width: int) -> RLE:
    """The mask of polygons, or of run lengths of either kind, on an image of this size.

    Raises:
        ValueError: It is none of them, or of an image of another size.
    """
    if isinstance(segmentation, list):
        return _filled(segmentation, height, width)
    counts = segmentation["counts"]
    runs = unpack(counts) if isinstance(counts, str) else [int(count) for count in counts]
    rows, columns = (int(side) for side in segmentation["size"])
    if (rows, columns) != (height, width):
        raise ValueError(f"a mask of {rows} x {columns} on an image of {height} x {width} (rows x columns)")
    return RLE((height, width), tuple(runs))


def _filled(polygons: list[Any], height: int, width: int) -> RLE:
    from pycocotools import mask as coco_mask

    most = FAR * max(height, width)
    shapes = [[float(value) for value in polygon] for polygon in polygons]
    for shape in shapes:
        # Four numbers would be taken for a box.
        if len(shape) < 6 or len(shape) % 2 or not all(abs(value) <= most for value in shape):
            raise ValueError("a polygon needs three points near its image")
    corners = [np.reshape(shape, (-1, 2)) for shape in shapes]
    if sum(np.abs(each - np.roll(each, 1, axis=0)).max(axis=1).sum() for each in corners) > MAX_OUTLINE:
        raise ValueError("polygons with an outline without end")
    union = coco_mask.merge(coco_mask.frPyObjects(shapes, height, width))
    return RLE((height, width), tuple(unpack(union["counts"].decode())))


def unpack(text: str) -> list[int]:
    """COCO's packed run lengths: 5 bits a character; from the third on, the change to the last but one.

    Raises:
        ValueError: The text ends within a number, or holds characters that do not occur.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > MAX_SHIFT:
            raise ValueError(f"{character!r} is no part of packed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("packed run lengths end within a number")
    return runs


def frame(mask: RLE) -> Box | None:
    """The box around a mask, from its runs; None if it is empty."""
    height = mask.size[0]
    ends = np.cumsum(np.asarray(mask.counts, dtype=np.int64))
    starts, stops = ends[0::2][: len(ends) // 2], ends[1::2]
    starts, stops = starts[stops > starts], stops[stops > starts]
    if not len(starts):
        return None
    columns, last_columns = starts // height, (stops - 1) // height
    # A run that goes on in the next column touches the lower edge here and the upper edge there.
    wraps = last_columns > columns
    tops = np.where(wraps, 0, starts % height)
    bottoms = np.where(wraps, height - 1, (stops - 1) % height)
    corners = (columns.min(), tops.min(), last_columns.max() + 1, bottoms.max() + 1)
    x0, y0, x1, y1 = (float(corner) for corner in corners)
    return x0, y0, x1, y1


def clipped(bbox: Sequence[float], width: int, height: int) -> Box | None:
    """The part of [x, y, w, h] that lies inside an image of this size; None if there is none.

    Raises:
        ValueError: A number is not finite.
    """
    x, y, w, h = (float(value) for value in bbox)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError(f"a box of {bbox}")
    box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    return box if box[2] > box[0] and box[3] > box[1] else None
