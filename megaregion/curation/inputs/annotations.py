"""SA-1B's annotations: the masks that came with an image, kept instead of proposing.

    {"image": {...}, "annotations": [{"segmentation": {"size": [h, w], "counts": RLE}, "bbox": [x, y, w, h],
                                      "predicted_iou": 0.97, ...}, ...]}

COCO writes the run lengths as a list or packed into text; both are read. A JSON file without such a list, as
img2dataset writes one beside every image, is no annotation.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from megaregion.curation.picture import BadImage, Picture, Proposal
from megaregion.data.sample import RLE, Box, decode_mask, encode_mask

MAX_SHIFT = 60
"""Bits of a run length before its last character: no image has more pixels, and endless numbers cost time."""


def read_annotations(content: bytes, picture: Picture) -> tuple[list[Proposal], Counter[str]] | None:
    """The regions of an annotation file, on the upright image.

    Annotations are of the pixels as they are stored. Where the camera was held upright or upside down, its
    sides tell whether they are of the upright image instead.

    Returns:
        Regions inside the image, and how many were dropped, by reason; None if the file annotates nothing.

    Raises:
        BadImage: It is not JSON in UTF-8.
    """
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise BadImage("its JSON file cannot be read") from None
    rows = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    turn = _turn_of(record, rows, picture)
    found: list[Proposal] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            region = _region(row, turn)
        except (KeyError, TypeError, ValueError, OverflowError):
            dropped["bad annotation"] += 1
            continue
        if region is None:
            dropped["outside the image"] += 1
        else:
            found.append(region)
    return found, dropped


class _Turn(NamedTuple):
    """From the pixels that annotations speak of to the upright ones: transposed, then mirrored."""

    width: int
    """Of the image that annotations speak of, in pixels."""
    height: int
    transposed: bool
    left_right: bool
    top_bottom: bool

    def box(self, box: Box) -> Box:
        """The same box on the upright image."""
        x0, y0, x1, y1 = box
        width, height = float(self.width), float(self.height)
        if self.transposed:
            x0, y0, x1, y1, width, height = y0, x0, y1, x1, height, width
        if self.left_right:
            x0, x1 = width - x1, width - x0
        if self.top_bottom:
            y0, y1 = height - y1, height - y0
        return x0, y0, x1, y1

    def mask(self, mask: RLE) -> RLE:
        """The same mask on the upright image."""
        if not (self.transposed or self.left_right or self.top_bottom):
            return mask
        pixels = decode_mask(mask)
        pixels = pixels.T if self.transposed else pixels
        pixels = pixels[:, ::-1] if self.left_right else pixels
        return encode_mask(pixels[::-1] if self.top_bottom else pixels)


TURNS = {
    2: (False, True, False), 3: (False, True, True), 4: (False, False, True), 5: (True, False, False),
    6: (True, True, False), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
"""What makes an image of each EXIF orientation upright: see _Turn."""


def _turn_of(record: dict[str, Any], rows: list[dict[str, Any]], picture: Picture) -> _Turn:
    turn = TURNS.get(picture.orientation, (False, False, False))
    upright = picture.width, picture.height
    stored = upright[::-1] if turn[0] else upright
    if stored != upright and upright in _sizes(record, rows):
        return _Turn(*upright, False, False, False)
    return _Turn(*stored, *turn)


def _sizes(record: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
    """Width and height that the file gives for its image and for its masks."""
    image = record.get("image")
    if isinstance(image, dict):
        yield image.get("width"), image.get("height")
    for row in rows:
        match row.get("segmentation"):
            case {"size": [height, width]}:
                yield width, height


def _region(row: dict[str, Any], turn: _Turn) -> Proposal | None:
    score = float(row.get("predicted_iou", 1.0))
    if not math.isfinite(score):
        raise ValueError(f"predicted_iou is {score}")
    mask, box = None, None
    if row.get("segmentation"):
        mask = _mask(row["segmentation"])
        if mask.size != (turn.height, turn.width):
            raise ValueError(f"a mask of {mask.size} on an image of {(turn.height, turn.width)}")
        box = _frame(mask)
    else:
        box = _clipped(row["bbox"], turn.width, turn.height)
    if box is None:
        return None
    return Proposal(turn.box(box), min(max(score, 0.0), 1.0), None if mask is None else turn.mask(mask))


def _mask(segmentation: dict[str, Any]) -> RLE:
    height, width = (int(side) for side in segmentation["size"])
    counts = segmentation["counts"]
    runs = _unpack(counts) if isinstance(counts, str) else [int(count) for count in counts]
    return RLE((height, width), tuple(runs))


def _unpack(text: str) -> list[int]:
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


def _frame(mask: RLE) -> Box | None:
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


def _clipped(bbox: list[float], width: int, height: int) -> Box | None:
    x, y, w, h = (float(value) for value in bbox)
    if not all(map(math.isfinite, (x, y, w, h))):
        raise ValueError(f"a box of {bbox}")
    box = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    return box if box[2] > box[0] and box[3] > box[1] else None
