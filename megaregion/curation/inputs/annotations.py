"""What annotations say of one image: the boxes and masks that came with it, kept instead of proposing.

    {"image": {"width": 640, "height": 480}, "classes": ["dog", ...],
     "annotations": [{"bbox": [x, y, w, h], "segmentation": ..., "iscrowd": 0, "score": 0.97, ...}, ...]}

SA-1B writes one such JSON for each image, without classes; :mod:`megaregion.curation.inputs.index` makes them
of all other kinds, with the class of each row. A JSON file without such a list, as img2dataset writes one
beside every image, is no annotation.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

from megaregion.curation.picture import BadImage, Picture, Proposal
from megaregion.data.coco import Unusable, region_of
from megaregion.data.sample import RLE, Box, decode_mask, encode_mask
from megaregion.schemas.curation import BOXED, POSES


def read_annotations(
    content: bytes, picture: Picture, pixels: str = "auto"
) -> tuple[list[Proposal], Counter[str]] | None:
    """The regions of an annotation, on the upright image.

    Args:
        content: JSON of one record, or of a list of them.
        picture: The image that it is about.
        pixels: Whether its numbers are of the ``stored`` pixels or of the ``upright`` image. ``auto`` goes by
            the size that it names for its image or masks; the stored ones where that does not tell.

    Returns:
        Regions inside the image, and how many rows were not used, by reason; None if nothing is annotated.
        The counts of BOXED and POSES are of rows that were used.

    Raises:
        BadImage: It is not JSON in UTF-8.
    """
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise BadImage("its JSON file cannot be read") from None
    found: list[Proposal] = []
    counts: Counter[str] = Counter()
    annotates = False
    for record in records if isinstance(records, list) else [records]:
        rows = record.get("annotations") if isinstance(record, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            continue
        annotates = True
        turn = _turn_of(record, rows, picture, pixels)
        classes = record.get("classes")
        named = isinstance(classes, list) and len(classes) == len(rows)
        counts[POSES] += sum(bool(row.get("keypoints")) for row in rows)
        for row, name in zip(rows, classes if named else repeat(""), strict=False):
            try:
                found.append(
                    replace(_region(row, turn, counts), source_class=str(name or row.get("class", "")))
                )
            except Unusable as why:
                counts[str(why)] += 1
            except (KeyError, TypeError, ValueError, OverflowError):
                counts["bad annotation"] += 1
    return (found, +counts) if annotates else None


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


def _turn_of(
    record: dict[str, Any], rows: list[dict[str, Any]], picture: Picture, pixels: str
) -> _Turn | None:
    """How to turn what a record says; None where it is of an image of another size."""
    turn = TURNS.get(picture.orientation, (False, False, False))
    upright = picture.width, picture.height
    stored = upright[::-1] if turn[0] else upright
    named = list(_sizes(record, rows))
    image = record.get("image")
    own = (image.get("width"), image.get("height")) if isinstance(image, dict) else (None, None)
    if all(type(side) is int for side in own) and own not in (upright, stored):
        return None
    if pixels == "upright" or (pixels == "auto" and stored != upright and upright in named):
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


def _region(row: dict[str, Any], turn: _Turn | None, counts: Counter[str]) -> Proposal:
    if row.get("iscrowd"):
        raise Unusable("crowd")
    if turn is None:
        raise Unusable("of an image of another size")
    score = float(row.get("predicted_iou", row.get("score", 1.0)))
    if not math.isfinite(score):
        raise ValueError(f"a score of {score}")
    box, mask, boxed = region_of(row, turn.width, turn.height)
    counts[BOXED] += boxed
    upright = None if mask is None else turn.mask(mask)
    return Proposal(turn.box(box), min(max(score, 0.0), 1.0), mask=upright)
