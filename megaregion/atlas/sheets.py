"""Sheets: one picture with many tiles, row by row, so that a page needs one file and not dozens."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from megaregion.atlas.crops import Tile, encode

COLUMNS = 6
"""Tiles in each row of a group's sheet; the page's cluster.js knows it too."""
COVER_COLUMNS = 16
"""Tiles in each row of a map sheet; map.js knows it too."""
COVER_SIDE = 48
"""Side of a tile on the map, in pixels."""
QUALITY = 82
EMPTY = (128, 128, 128)
"""Colour of a place whose image could not be read."""


def write_sheet(path: Path, tiles: Mapping[int, Tile], count: int, side: int, columns: int) -> None:
    """Write a sheet.

    Args:
        path: The JPEG file to make.
        tiles: Tiles by their slot; slots without one stay grey.
        count: Number of slots.
        side: Side of a tile, in pixels; others are scaled.
        columns: Tiles of a row.
    """
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * side), EMPTY)
    for slot, tile in tiles.items():
        sheet.paste(_open(tile, side), (slot % columns * side, slot // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(sheet, QUALITY))


def make_cover(tile: Tile) -> Tile:
    """The tile in the size that the map shows, closer up: what surrounds the region would not be seen."""
    image = Image.open(io.BytesIO(tile.jpeg))
    x0, y0, x1, y1 = (edge * image.width / 1000 for edge in tile.box)
    side = min(max(x1 - x0, y1 - y0, 8.0), float(image.width))
    left = min(max((x0 + x1 - side) / 2, 0.0), image.width - side)
    top = min(max((y0 + y1 - side) / 2, 0.0), image.height - side)
    box = (left, top, left + side, top + side)
    cover = image.resize((COVER_SIDE, COVER_SIDE), Image.Resampling.BICUBIC, box=box)
    return Tile(encode(cover, QUALITY), (0, 0, 1000, 1000))


def _open(tile: Tile, side: int) -> Image.Image:
    image = Image.open(io.BytesIO(tile.jpeg))
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
