"""What is known of one image: its size and its labelled regions, as KEY.json stores them.

A record that contradicts itself raises :class:`BadSample`; the loader replaces such a sample, counts
it and names it. Boxes may stick out of the image here: the transform clips them, and drops and counts
a box that has no area inside its image.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple

from megaregion.data.mask import RLE

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
    """Cluster of an object; None for text."""
    tokens: tuple[int, ...] = ()
    """Token ids of the text; empty for objects."""
    score: float = 1.0
    """Confidence of the proposal or of the text recognition."""
    text: str = ""
    """The text itself; empty for objects."""
    mask: RLE | None = None
    """Exact shape of the region at the image's size, where it is known."""

    @property
    def labels(self) -> tuple[int, ...]:
        """All positive classes: the cluster of an object, the distinct tokens of a text in order."""
        return tuple(dict.fromkeys(self.tokens)) if self.label is None else (self.label,)


class SampleRecord(NamedTuple):
    """Size of one image, in pixels, and its regions."""

    width: int
    height: int
    regions: tuple[RegionRecord, ...]

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
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadSample(f"record cannot be read: {error}") from None
    return SampleRecord(width, height, regions)


def clip_regions(record: SampleRecord) -> tuple[SampleRecord, int]:
    """Cut every box to its image.

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
    return SampleRecord(width, height, tuple(kept)), len(record.regions) - len(kept)


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
        return RegionRecord("object", (x0, y0, x1, y1), _count(region["label"]), (), score, "", mask)
    if kind == "text":
        tokens = tuple(map(_count, region["tokens"]))
        if not tokens:
            raise BadSample(f"record has a text region without tokens: {region.get('text', '')!r}")
        return RegionRecord("text", (x0, y0, x1, y1), None, tokens, score, str(region.get("text", "")), mask)
    raise BadSample(f"record has a region of unknown kind {kind!r}")


def _region_to_dict(region: RegionRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": region.kind, "box": list(region.box)}
    if region.kind == "object":
        fields["label"] = region.label
    else:
        fields |= {"text": region.text, "tokens": list(region.tokens)}
    fields["score"] = region.score
    if region.mask is not None:
        fields["mask"] = {"size": list(region.mask.size), "counts": list(region.mask.counts)}
    return fields


def _count(value: Any) -> int:
    # A bool passes for an int in Python, and 3.7 must not become class 3.
    if type(value) is not int or value < 0:
        raise BadSample(f"record has {value!r} where a whole number of 0 or more belongs")
    return value
