"""The second pass: reads each sample that some page needs once, and cuts what is wanted from it.

A tile is a square window around a region. Tiles are cut in the order of the samples but needed in that of
the groups (clusters, tokens, squares of the map), so a spool sorts them into files of neighbouring groups,
each of which fits memory. A sheet is one picture with many tiles, so that a page loads one file, not dozens.

Shapes: m wanted crops.
"""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from megaregion.atlas.source import Integers, Sample, Source
from megaregion.data.order import mix
from megaregion.data.sample import BadSample, Box

TOGETHER = 32
"""Samples that a worker does at once."""
IMAGE_SIDE = 720
"""Longest side of a browsed sample, in pixels."""
IMAGE_QUALITY = 84
CONTEXT = 1.7
"""Side of the window, in longer edges of the region."""
LEAST = 24
"""Least side of the window, in pixels: fewer only show the scaling."""
SCALE = 1000
"""Units of a tile's side in which the region's box is given."""
SPOOLED_QUALITY = 95
"""JPEG quality of a tile on its way into a sheet, where it is encoded once more."""
LONGEST_TEXT = 1000
BUFFERED = 32 * 2**20
"""Bytes of tiles that wait in memory before they are written."""
COVER_SIDE = 48
"""Side of a tile on the map, in pixels; map.js knows it too."""
QUALITY = 82
EMPTY = (128, 128, 128)
"""Colour of a place whose image could not be read."""

CLUSTER, TOKEN, BROWSED = range(3)
"""What is wanted of a sample: a tile for a cluster or for a token, or the whole sample."""


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


@dataclass
class Cropped:
    """What some samples gave."""

    samples: int = 0
    cuts: tuple[list[Cut], list[Cut]] = field(default_factory=lambda: ([], []))
    """For clusters and for tokens."""
    browsed: list[tuple[dict[str, Any], bytes]] = field(default_factory=list)
    """What the page says of each sample, and its JPEG."""
    damaged: int = 0
    """Samples that cannot be read."""


# ---- what to cut -----------------------------------------------------------------------------------


def draw_samples(samples: int, wanted: int, seed: int) -> Integers:
    """Numbers of the samples to browse, in rising order; all if `wanted` is 0 or no less than there are."""
    numbers = np.arange(samples)
    if not wanted or wanted >= samples:
        return numbers
    return np.sort(np.argsort(mix(numbers, seed + 1), kind="stable")[:wanted])


def plan_crops(clusters: Integers, tokens: Integers, browsed: Integers) -> tuple[int, list[Integers]]:
    """Sort the wanted crops by sample; those of groups are sample, region, group and slot, [m, 4].

    Gives the number of samples, and for each task of a worker rows of sample, region, group, slot and kind.
    """
    whole = np.zeros((len(browsed), 4), dtype=np.int64)
    whole[:, 0] = browsed
    kinds = ((CLUSTER, clusters), (TOKEN, tokens), (BROWSED, whole))
    wants = np.concatenate([np.insert(rows, 4, kind, axis=1) for kind, rows in kinds])
    wants = wants[np.argsort(wants[:, 0], kind="stable")]
    samples, starts = np.unique(wants[:, 0], return_index=True)
    return len(samples), np.split(wants, starts[TOGETHER::TOGETHER]) if len(wants) else []


def cut_crops(source: Source, side: int, wants: Integers) -> Cropped:
    """Do one task: tiles of this side, in pixels, and whole samples."""
    found = Cropped()
    for own in np.split(wants, np.flatnonzero(np.diff(wants[:, 0])) + 1):
        number = int(own[0, 0])
        found.samples += 1
        try:
            sample = source.read(number)
        except BadSample:
            found.damaged += 1
            continue
        for _, place, group, slot, kind in own.tolist():
            if kind == BROWSED:
                jpeg = _encode(_shrink(sample.image, IMAGE_SIDE), IMAGE_QUALITY)
                found.browsed.append((_describe(number, sample), jpeg))
            else:
                # The record's boxes are in pixels of the stored image, whatever the record says of its size.
                region = sample.record.regions[place]
                tile = cut_tile(sample.image, region.box, side)
                found.cuts[kind].append(Cut(group, slot, tile, region.text[:LONGEST_TEXT]))
    return found


def _describe(number: int, sample: Sample) -> dict[str, Any]:
    """What the page of a sample says: 0 is an object with its cluster, 1 a text with its tokens."""
    regions: list[list[Any]] = []
    for region in sample.record.regions:
        box = [round(edge, 1) for edge in region.box]
        if region.kind == "object":
            regions.append([0, *box, round(region.score, 3), region.label])
        else:
            regions.append([1, *box, round(region.score, 3), region.text, list(region.labels)])
    record = sample.record
    return {"n": number, "key": sample.key, "w": record.width, "h": record.height, "r": regions}


# ---- pictures --------------------------------------------------------------------------------------


def cut_tile(image: Image.Image, box: Box, side: int) -> Tile:
    """Cut a region of an RGB image with its surroundings; its box may stick out. All in pixels."""
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
    return Tile(_encode(part, SPOOLED_QUALITY), (inside[0], inside[1], inside[2], inside[3]))


def make_cover(tile: Tile) -> Tile:
    """The tile in the size that the map shows, closer up: what surrounds the region would not be seen."""
    image = Image.open(io.BytesIO(tile.jpeg))
    x0, y0, x1, y1 = (edge * image.width / SCALE for edge in tile.box)
    side = min(max(x1 - x0, y1 - y0, 8.0), float(image.width))
    left = _slide((x0 + x1) / 2, side, image.width)
    top = _slide((y0 + y1) / 2, side, image.height)
    box = (left, top, left + side, top + side)
    cover = image.resize((COVER_SIDE, COVER_SIDE), Image.Resampling.BICUBIC, box=box)
    return Tile(_encode(cover, QUALITY), (0, 0, SCALE, SCALE))


def write_sheet(path: Path, tiles: Mapping[int, Tile], count: int, side: int, columns: int) -> None:
    """Write a JPEG of so many slots in columns, tiles of this side in pixels; slots without one stay grey."""
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * side), EMPTY)
    for slot, tile in tiles.items():
        place = (slot % columns * side, slot // columns * side)
        sheet.paste(Image.open(io.BytesIO(tile.jpeg)), place)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encode(sheet, QUALITY))


def _shrink(image: Image.Image, longest: int) -> Image.Image:
    if max(image.size) <= longest:
        return image
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.BICUBIC)
    return small


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _slide(center: float, window: float, extent: int) -> float:
    """Where a window begins: around the center, but inside the image, or centred if it does not fit."""
    if window >= extent:
        return (extent - window) / 2
    return min(max(center - window / 2, 0.0), extent - window)


# ---- from the order of samples to that of groups ---------------------------------------------------


class Spool:
    """Takes tiles in any order and gives them back by files of groups, in a folder of its own."""

    def __init__(self, folder: Path, groups_per_file: int) -> None:
        self._folder, self._per_file = folder, groups_per_file
        self._waiting: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._bytes = 0
        folder.mkdir()

    def add(self, cuts: Iterable[Cut]) -> None:
        """Take tiles in."""
        for cut in cuts:
            content = pickle.dumps(cut)
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
        content = io.BytesIO(path.read_bytes())
        path.unlink()
        while content.tell() < len(content.getbuffer()):
            cut: Cut = pickle.load(content)
            found[cut.group].append(cut)
        for cuts in found.values():
            cuts.sort(key=lambda cut: cut.slot)
        return found

    def _write(self) -> None:
        for number, content in self._waiting.items():
            with (self._folder / str(number)).open("ab") as file:
                file.write(content)
        self._waiting.clear()
        self._bytes = 0
