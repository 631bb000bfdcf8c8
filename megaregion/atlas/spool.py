"""Tiles on their way: cut in the order of the samples, needed in the order of the groups.

They are sorted into files of neighbouring groups, so that each file fits memory when its sheets are made.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megaregion.atlas.crops import Tile

HEADER = struct.Struct("<IHHHHHHI")
"""Group, slot, the box's four edges, length of the text, length of the image."""
BUFFERED = 32 * 2**20
"""Bytes that wait in memory before they are written."""


class Cut(NamedTuple):
    """A tile, and the place it is for."""

    group: int
    slot: int
    tile: Tile
    text: str = ""


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
