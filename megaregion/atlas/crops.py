"""Crops in context: a square window around a region, scaled to a tile, and where the region lies in it."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from megaregion.data.sample import BadSample, Box

CONTEXT = 1.7
"""Side of the window, in longer edges of the region."""
LEAST = 24
"""Least side of the window, in pixels: fewer only show the scaling."""
SCALE = 1000
"""Units of a tile's side in which the region's box is given."""
SPOOLED_QUALITY = 95
"""JPEG quality of a tile on its way into a sheet, where it is encoded once more."""


class Tile(NamedTuple):
    """One crop."""

    jpeg: bytes
    box: tuple[int, int, int, int]
    """The region in the tile, in thousandths of its side."""


def decode(image: Image.Image) -> Image.Image:
    """Decode an image to RGB.

    Raises:
        BadSample: It is truncated or damaged.
    """
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None


def cut_tile(image: Image.Image, box: Box, side: int) -> Tile:
    """Cut a region with its surroundings.

    Args:
        image: RGB.
        box: The region, in pixels; may stick out of the image.
        side: Side of the tile, in pixels.
    """
    x0, y0, x1, y1 = box
    window = max(x1 - x0, y1 - y0) * CONTEXT
    window = max(min(window, max(image.size)), LEAST)
    left = _slide((x0 + x1) / 2, window, image.width)
    top = _slide((y0 + y1) / 2, window, image.height)
    seen = (max(left, 0.0), max(top, 0.0), min(left + window, image.width), min(top + window, image.height))
    scale = side / window
    size = (max(round((seen[2] - seen[0]) * scale), 1), max(round((seen[3] - seen[1]) * scale), 1))
    part = image.resize(size, Image.Resampling.BICUBIC, box=seen, reducing_gap=2.0)
    if size != (side, side):
        # The image is narrower than the window: its mean colour fills what is left.
        tile = Image.new("RGB", (side, side), part.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        tile.paste(part, (round((seen[0] - left) * scale), round((seen[1] - top) * scale)))
        part = tile
    places = ((x0 - left, y0 - top), (x1 - left, y1 - top))
    inside = [min(max(round(v / window * SCALE), 0), SCALE) for place in places for v in place]
    return Tile(encode(part, SPOOLED_QUALITY), (inside[0], inside[1], inside[2], inside[3]))


def shrink(image: Image.Image, longest: int) -> Image.Image:
    """The image, no longer than this many pixels."""
    if max(image.size) <= longest:
        return image
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return small


def encode(image: Image.Image, quality: int) -> bytes:
    """The image as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _slide(center: float, window: float, extent: int) -> float:
    """Where a window begins: around the center, but inside the image, or centred if it does not fit."""
    if window >= extent:
        return (extent - window) / 2
    return min(max(center - window / 2, 0.0), extent - window)
