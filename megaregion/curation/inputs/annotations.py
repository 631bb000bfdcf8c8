"""SA-1B's annotations: the masks that came with an image, kept instead of proposing.

    {"image": {...}, "annotations": [{"segmentation": {"size": [h, w], "counts": RLE}, "bbox": [x, y, w, h],
                                      "predicted_iou": 0.97, ...}, ...]}

Polygons and run lengths of either kind are read. A JSON file without such a list, as
img2dataset writes one beside every image, is no annotation.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from megaregion.curation.picture import BadImage, Picture, Proposal
from megaregion.data.coco import clipped, frame, mask_of
from megaregion.data.sample import RLE, Box, decode_mask, encode_mask


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
        mask = mask_of(row["segmentation"], turn.height, turn.width)
        box = frame(mask)
    else:
        box = clipped(row["bbox"], turn.width, turn.height)
    if box is None:
        return None
    return Proposal(turn.box(box), min(max(score, 0.0), 1.0), None if mask is None else turn.mask(mask))
