"""What is known of one image: its size, its labelled regions and their masks, as KEY.json stores them.

A record that contradicts itself raises :class:`BadSample`; the loader replaces such a sample, counts
it and names it. Boxes may stick out of the image here: the transform clips them, and drops and counts
a box that has no area inside its image. Masks are run lengths in COCO's uncompressed form.

Shapes: h x w pixels of the stored image, g x g patches of the crop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.bounds import shown

RegionKind = Literal["object", "text"]
Box = tuple[float, float, float, float]


class BadSample(ValueError):
    """A sample that cannot be used; the text is the reason."""


class RegionRecord(NamedTuple):
    """One labelled region: an object with its cluster, or a line of text with its tokens.

    A tuple, because the loader makes a dozen for each image, and a frozen dataclass takes five times as long.
    """

    kind: RegionKind
    """What the region shows, and so which head learns from it."""
    box: Box
    """x0, y0, x1, y1 in pixels of the stored image; x1 and y1 exclusive."""
    label: int | None = None
    """Cluster of an object, the nearest; None for text."""
    tokens: tuple[int, ...] = ()
    """Token ids of the text; empty for objects."""
    score: float = 1.0
    """Confidence of the proposal or of the text recognition."""
    text: str = ""
    """The text itself; empty for objects."""
    mask: RLE | None = None
    """Exact shape of the region at the image's size, where it is known."""
    source_class: str = ""
    """Class that the annotation of an object names; nothing learns from it."""
    others: tuple[int, ...] = ()
    """The next nearest clusters of an object, where the dataset holds them."""

    @property
    def labels(self) -> tuple[int, ...]:
        """What may be positive classes: an object's clusters, nearest first, or a text's distinct tokens."""
        return tuple(dict.fromkeys(self.tokens)) if self.label is None else (self.label, *self.others)


class SampleRecord(NamedTuple):
    """Size of one image, in pixels, and its regions."""

    width: int
    height: int
    regions: tuple[RegionRecord, ...]
    caption: str = ""
    """The text that came with the image; nothing learns from it."""

    def to_json(self) -> bytes:
        """The content of KEY.json.

        Raises:
            ValueError: A number is not finite.
        """
        content = {
            "width": self.width,
            "height": self.height,
            "regions": [_region_to_dict(region) for region in self.regions],
        }
        if self.caption:
            content["caption"] = self.caption
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_sample(content: bytes) -> SampleRecord:
    """Read the content of KEY.json.

    Raises:
        BadSample: The record is not JSON, lacks a field, or contradicts itself.
    """
    try:
        record = json.loads(content)
        width, height = _count(record["width"]), _count(record["height"])
        if not (width and height):
            raise BadSample(f"record has an image of {width} x {height} pixels")
        regions = tuple(_parse_region(region, width, height) for region in record["regions"])
    except BadSample:
        raise
    except KeyError as missing:
        raise BadSample(f"record lacks {missing}") from None
    # RecursionError: deeply nested brackets exhaust the JSON parser's stack.
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise BadSample(f"record cannot be read: {shown(error)}") from None
    return SampleRecord(width, height, regions, str(record.get("caption", "")))


def clip_regions(record: SampleRecord) -> tuple[SampleRecord, int]:
    """Clip every box to its image.

    Returns:
        The record with boxes inside its image, and how many regions were dropped.

    Raises:
        BadSample: There were regions, and none has area inside the image.
    """
    width, height, kept = record.width, record.height, []
    for region in record.regions:
        x0, y0, x1, y1 = region.box
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
            kept.append(region)
            continue
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
        if box[0] < box[2] and box[1] < box[3]:
            kept.append(region._replace(box=box))
    if record.regions and not kept:
        raise BadSample(f"record has no region with area inside its {width} x {height} image")
    return record._replace(regions=tuple(kept)), len(record.regions) - len(kept)


def _parse_region(region: dict[str, Any], width: int, height: int) -> RegionRecord:
    kind = region["kind"]
    x0, y0, x1, y1 = map(float, region["box"])
    score = float(region.get("score", 1.0))
    # One sum instead of five looks: it is finite only if all are (or they are beyond any image).
    if not math.isfinite(x0 + y0 + x1 + y1 + score):
        raise BadSample(f"record has a region whose box or score is not finite: {region['box']}, {score}")
    mask = None
    if region.get("mask") is not None:
        rows, columns = region["mask"]["size"]
        counts = tuple(region["mask"]["counts"])
        # A mask has hundreds of runs: look at their types at once; RLE itself looks at their signs.
        if not set(map(type, counts)) <= {int}:
            raise BadSample("record has a mask whose runs are not whole numbers")
        mask = RLE((_count(rows), _count(columns)), counts)
        if mask.size != (height, width):
            raise BadSample(f"mask of {rows} x {columns} in an image of {height} x {width} (rows x columns)")
    if kind == "object":
        label, others = _count(region["label"]), tuple(map(_count, region.get("labels", ())))
        if others and (others[0] != label or len(set(others)) < len(others)):
            raise BadSample(
                f"record has an object whose labels do not begin with its label {label}, or repeat"
            )
        facts = score, "", mask, str(region.get("source_class", "")), others[1:]
        return RegionRecord("object", (x0, y0, x1, y1), label, (), *facts)
    if kind == "text":
        tokens = tuple(map(_count, region["tokens"]))
        if not tokens:
            raise BadSample(f"record has a text region without tokens: {shown(region.get('text', ''))}")
        return RegionRecord("text", (x0, y0, x1, y1), None, tokens, score, str(region.get("text", "")), mask)
    raise BadSample(f"record has a region of unknown kind {shown(kind)}")


def _region_to_dict(region: RegionRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": region.kind, "box": list(region.box)}
    if region.kind == "object":
        fields["label"] = region.label
        if region.source_class:
            fields["source_class"] = region.source_class
        if region.others:
            fields["labels"] = list(region.labels)
    else:
        fields |= {"text": region.text, "tokens": list(region.tokens)}
    fields["score"] = region.score
    if region.mask is not None:
        fields["mask"] = {"size": list(region.mask.size), "counts": list(region.mask.counts)}
    return fields


def _count(value: Any) -> int:
    # A bool passes for an int in Python, and 3.7 must not become class 3.
    if type(value) is not int or not 0 <= value < 2**31:
        raise BadSample(f"record has {shown(value)} where a whole number of 0 or more belongs")
    return value


@dataclass(frozen=True)
class RLE:
    """A binary mask as runs of zeros and ones in turn, column by column, zeros first.

    Raises:
        ValueError: The runs are negative or do not add up to the size.
    """

    size: tuple[int, int]
    """Height and width of the image, in pixels."""
    counts: Sequence[int]
    """Lengths of the runs; the first is of zeros and may be 0."""

    def __post_init__(self) -> None:
        height, width = self.size
        if min(self.counts, default=-1) < 0 or sum(self.counts) != height * width:
            raise ValueError(f"mask runs do not add up to {height} x {width} pixels")


def encode_mask(mask: NDArray[np.bool_]) -> RLE:
    """Run lengths of a mask, bool [h, w]."""
    height, width = mask.shape
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = np.concatenate([[0] if flat.size and flat[0] else [], changes, [flat.size]]).astype(np.int64)
    return RLE((height, width), tuple(np.diff(ends, prepend=0).tolist()))


def decode_mask(rle: RLE) -> NDArray[np.bool_]:
    """The mask of some run lengths, bool [h, w]."""
    height, width = rle.size
    inside = np.arange(len(rle.counts)) % 2 == 1
    return np.repeat(inside, rle.counts).reshape(width, height).T


def mask_area(rle: RLE, x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact area of the mask in each cell of a grid, [g, g] in square pixels, without decoding the mask.

    The number of ones among the first t pixels, column by column, is a piecewise linear function
    of t with its knots at the ends of the runs. So the part of a column between two heights is a
    difference of two interpolations, and the cells follow by weighting the columns. The grid's rising
    borders, [g + 1], lie within the image.
    """
    first, last = int(np.floor(x_edges[0])), int(np.ceil(x_edges[-1]))
    columns = np.arange(first, last)
    counts = np.asarray(rle.counts, dtype=np.int64)
    ones = np.where(np.arange(counts.size) % 2 == 1, counts, 0)
    places = columns[:, None] * rle.size[0] + y_edges[None, :]
    heights = np.diff(np.interp(places, np.cumsum(counts), np.cumsum(ones)), axis=1)
    return (overlap(x_edges, columns, columns + 1) @ heights).T


def overlap(
    edges: NDArray[np.float64],
    starts: NDArray[np.generic] | Sequence[float],
    ends: NDArray[np.generic] | Sequence[float],
) -> NDArray[np.float64]:
    """Length that each cell of a row with rising borders [g + 1] shares with each of k intervals, [g, k]."""
    length = np.minimum.outer(edges[1:], ends)
    length -= np.maximum.outer(edges[:-1], starts)
    return np.maximum(length, 0.0, out=length)
