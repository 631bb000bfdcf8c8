"""Tiles: crops in context, kept on disk until their groups come up, then pasted into sheets.

A tile is a square window around a region. Tiles are cut in the order of the samples but needed in that of
the groups (clusters, tokens, squares of the map), so a spool sorts them into files of neighbouring groups,
each of which fits memory. A sheet is one picture with many tiles, so that a page loads one file, not dozens.
"""

from __future__ import annotations

import io
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from megaregion.data.sample import Box

CONTEXT = 1.7
"""Side of the window, in longer edges of the region."""
LEAST = 24
"""Least side of the window, in pixels: fewer only show the scaling."""
SCALE = 1000
"""Units of a tile's side in which the region's box is given."""
SPOOLED_QUALITY = 95
"""JPEG quality of a tile on its way into a sheet, where it is encoded once more."""
HEADER = struct.Struct("<IHHHHHHI")
"""Group, slot, the box's four edges, length of the text, length of the image."""
BUFFERED = 32 * 2**20
"""Bytes of tiles that wait in memory before they are written."""
COLUMNS = 6
"""Tiles in each row of a group's sheet; dom.js knows it too."""
COVER_COLUMNS = 16
"""Tiles in each row of a map sheet; map.js knows it too."""
COVER_SIDE = 48
"""Side of a tile on the map, in pixels; map.js knows it too."""
QUALITY = 82
EMPTY = (128, 128, 128)
"""Colour of a place whose image could not be read."""


class Tile(NamedTuple):
    """One crop."""

    jpeg: bytes
    box: tuple[int, int, int, int]
    """The region in the tile, in thousandths of its side."""


class Cut(NamedTuple):
    """A tile, and the place it is for."""

    group: int
    slot: int
    tile: Tile
    text: str = ""


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


class Spool:
    """Takes tiles in any order and gives them back by files of groups.

    Args:
        folder: Where the files lie.
        groups_per_file: Groups that share one.
    """

    def __init__(self, folder: Path, groups_per_file: int) -> None:
        self._folder, self._per_file = folder, groups_per_file
        self._waiting: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._bytes = 0
        folder.mkdir(parents=True)

    def add(self, cuts: Iterable[Cut]) -> None:
        """Take tiles in."""
        for cut in cuts:
            text = cut.text.encode(errors="replace")[:1000]
            content = (
                HEADER.pack(cut.group, cut.slot, *cut.tile.box, len(text), len(cut.tile.jpeg))
                + text
                + cut.tile.jpeg
            )
            self._waiting[cut.group // self._per_file] += content
            self._bytes += len(content)
            if self._bytes > BUFFERED:
                self._write()

    def take(self, number: int) -> dict[int, list[Cut]]:
        """The tiles of file `number` by group, in the order of their slots; the file is gone after."""
        self._write()
        path = self._folder / str(number)
        found: defaultdict[int, list[Cut]] = defaultdict(list)
        if not path.is_file():
            return found
        content, place = path.read_bytes(), 0
        path.unlink()
        while place < len(content):
            group, slot, x0, y0, x1, y1, letters, size = HEADER.unpack_from(content, place)
            image = place + HEADER.size + letters
            text = content[place + HEADER.size : image].decode(errors="replace")
            found[group].append(Cut(group, slot, Tile(content[image : image + size], (x0, y0, x1, y1)), text))
            place = image + size
        for cuts in found.values():
            cuts.sort(key=lambda cut: cut.slot)
        return found

    def _write(self) -> None:
        for number, content in self._waiting.items():
            with (self._folder / str(number)).open("ab") as file:
                file.write(content)
        self._waiting.clear()
        self._bytes = 0


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
