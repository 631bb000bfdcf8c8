"""What a row of an annotation says of its image: a box, and a shape where it has one.

    {"bbox": [x, y, w, h], "iscrowd": 0,
     "segmentation": [[x0, y0, x1, y1, ...], ...] or {"size": [h, w], "counts": RLE}}

COCO writes rows so; :mod:`megaregion.data.formats` brings those of other formats into this form. Numbers are
pixels of the image, or shares of its sides in a ``relative`` row. Run lengths are a list or packed text. A
shape of several polygons is their union.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from megaregion.data.sample import RLE, Box

MAX_SHIFT = 60
"""Bits of a run length before its last character: no image has more pixels, and endless numbers cost time."""
FAR = 10
"""Sides of its image that a polygon may lie away from it: its outline costs memory by its length."""

MAX_OUTLINE = 2**20
"""Pixels along all edges of a shape's polygons, of which each costs pycocotools 80 bytes."""


class Unusable(ValueError):
    """A row that gives no region; the text is the reason."""


class Region(NamedTuple):
    """What a row says."""

    box: Box
    """x0, y0, x1, y1 in pixels, inside the image; of a row with a shape, around the shape."""
    mask: RLE | None
    boxed: bool
    """Whether the row has a shape that cannot be used, so that its box stands in."""


def region_of(row: Mapping[str, Any], width: int, height: int) -> Region:
    """What a row says of an image of this size.

    Raises:
        Unusable: It contradicts itself, or nothing of it lies inside.
    """
    try:
        shape, scale = row.get("segmentation"), (width, height) if row.get("relative") else (1, 1)
        mask = _mask(shape, width, height, scale) if shape else None
        if mask is not None and (box := frame(mask)) is not None:
            return Region(box, mask, False)
        if mask is not None and isinstance(shape, dict):
            raise Unusable("no area")
        outline = shape and isinstance(shape, list) and row.get("bbox") is None
        box = _inside(_outline(shape) if outline else row["bbox"], width, height, scale)
    except Unusable:
        raise
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Unusable("bad annotation") from None
    return Region(box, None, bool(shape))


def _mask(shape: Any, width: int, height: int, scale: tuple[int, int]) -> RLE | None:
    """The mask of a segmentation, empty for polygons thinner than a pixel; None if it is unusable."""
    try:
        if isinstance(shape, list):
            shape = [[value * scale[place % 2] for place, value in enumerate(polygon)] for polygon in shape]
        return mask_of(shape, height, width)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _inside(bbox: Sequence[float], width: int, height: int, scale: tuple[int, int]) -> Box:
    bbox = [float(value) * scale[place % 2] for place, value in enumerate(bbox)]
    box = clipped(bbox, width, height)
    if min(bbox[2:]) <= 0:
        raise Unusable("no area")
    if box is None:
        raise Unusable("outside the image")
    return box


def _outline(polygons: Any) -> list[float]:
    """The box [x, y, w, h] around some polygons."""
    corners = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons])
    return [*corners.min(axis=0).tolist(), *np.ptp(corners, axis=0).tolist()]


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
