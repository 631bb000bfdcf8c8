"""The data of every kind of page, written chunk by chunk; the scripts in site/ read just these.

Shapes: K clusters, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaregion.atlas.census import Groups
from megaregion.atlas.chart import MapTile
from megaregion.atlas.chunks import packed, write_chunk
from megaregion.atlas.members import Members
from megaregion.atlas.neighbours import Neighbours
from megaregion.atlas.projection import Places
from megaregion.atlas.sheets import COLUMNS, COVER_COLUMNS, COVER_SIDE, make_cover, write_sheet
from megaregion.atlas.spool import Cut, Spool

CHUNK = 64
"""Clusters, tokens or samples of a chunk."""
DIRECTORY = 256
"""Files of a folder of sheets or images."""
ORDER_CHUNK = 4080
"""Clusters of a chunk of an order: a whole number of the list's pages of 48."""
COVERS = 256
"""Tiles of a map sheet."""
Tick = Callable[[int], object]


def permille(value: float) -> int:
    """A cosine in thousandths; -1000 and less where it is not known."""
    return round(float(value) * 1000) if np.isfinite(value) else -2000


class ClusterPages:
    """Writes clusters/N, and orders/NAME/N for the list of all of them.

    Args:
        site: The atlas's folder.
        groups: The clusters.
        tile: Side of a crop, in pixels.
    """

    def __init__(self, site: Path, groups: Groups, tile: int) -> None:
        self._site, self._groups, self._tile = site, groups, tile

    def write(
        self,
        places: Places,
        near: Neighbours,
        tiles: Spool,
        covers: Spool,
        chart: Sequence[MapTile],
        tick: Tick,
    ) -> None:
        """Write the pages' data and sheets; hand what the map shows to `covers`, grouped by map tile."""
        groups, xy = self._groups, np.round(places.position * 65_535).astype(np.int64)
        seat = np.zeros((len(groups.sizes), 2), dtype=np.int32)
        for number, part in enumerate(chart):
            seat[part.clusters, 0] = number
            seat[part.clusters, 1] = np.arange(len(part.clusters))
        for first in range(0, len(groups.sizes), CHUNK):
            numbers = range(first, min(first + CHUNK, len(groups.sizes)))
            cuts = tiles.take(first // CHUNK)
            _write_group_sheets(self._site, "clusters", groups, numbers, cuts, self._tile)
            for number in cuts:
                if cuts[number][0].slot == 0:
                    cover = make_cover(cuts[number][0].tile)
                    covers.add([Cut(int(seat[number, 0]), int(seat[number, 1]), cover)])
            write_chunk(
                self._site,
                f"clusters/{first // CHUNK}",
                {
                    "size": groups.sizes[first : numbers.stop].tolist(),
                    "mean": [permille(value) for value in groups.closeness[first : numbers.stop]],
                    "x": xy[first : numbers.stop, 0].tolist(),
                    "y": xy[first : numbers.stop, 1].tolist(),
                    "sheet": groups.cropped[first : numbers.stop].astype(int).tolist(),
                    "near": [self._neighbours(near, number) for number in numbers],
                    "members": [_members(groups, number, cuts.get(number, [])) for number in numbers],
                },
            )
            tick(len(numbers))

    def write_orders(self, tick: Tick) -> None:
        """Write the lists: by number, the largest first, the loosest first."""
        groups = self._groups
        orders = {
            "number": np.arange(len(groups.sizes)),
            "size": np.argsort(-groups.sizes, kind="stable"),
            # NaN sorts last: nobody knows how loose an empty cluster is.
            "spread": np.argsort(groups.closeness, kind="stable"),
        }
        for name, order in orders.items():
            for start in range(0, len(order), ORDER_CHUNK):
                part = order[start : start + ORDER_CHUNK]
                means = np.nan_to_num(groups.closeness[part] * 1000, nan=-2000).round().astype(np.int16)
                content = {
                    "id": packed(part.astype(np.int32)),
                    "size": packed(np.minimum(groups.sizes[part], 2**31 - 1).astype(np.int32)),
                    "mean": packed(means),
                    "sheet": packed(groups.cropped[part].astype(np.uint8)),
                }
                write_chunk(self._site, f"orders/{name}/{start // ORDER_CHUNK}", content)
                tick(len(part))

    def _neighbours(self, near: Neighbours, number: int) -> list[int]:
        """Number, cosine, size and sheet of each neighbour, one after the other."""
        flat: list[int] = []
        for other, cosine in zip(near.cluster[number].tolist(), near.cosine[number].tolist(), strict=True):
            if other >= 0:
                size, sheet = int(self._groups.sizes[other]), int(self._groups.cropped[other])
                flat += [other, permille(cosine), size, sheet]
        return flat


def write_tokens(
    site: Path, groups: Groups, pieces: Sequence[str], tiles: Spool, tile: int, tick: Tick
) -> None:
    """Write tokens/N and tokens/index, by which the page searches."""
    for first in range(0, len(pieces), CHUNK):
        numbers = range(first, min(first + CHUNK, len(pieces)))
        cuts = tiles.take(first // CHUNK)
        _write_group_sheets(site, "tokens", groups, numbers, cuts, tile)
        content = {
            "size": groups.sizes[first : numbers.stop].tolist(),
            "sheet": groups.cropped[first : numbers.stop].astype(int).tolist(),
            "members": [_members(groups, number, cuts.get(number, [])) for number in numbers],
            "texts": [{cut.slot: cut.text for cut in cuts.get(number, [])} for number in numbers],
        }
        write_chunk(site, f"tokens/{first // CHUNK}", content)
        tick(len(numbers))
    index = {
        "piece": list(pieces),
        "size": groups.sizes.tolist(),
        "sheet": groups.cropped.astype(int).tolist(),
    }
    write_chunk(site, "tokens/index", index)


def write_map(
    site: Path, chart: Sequence[MapTile], places: Places, groups: Groups, covers: Spool, tick: Tick
) -> None:
    """Write map/NAME for every tile of the map, and its sheets of covers."""
    xy = np.round(places.position * 65_535).astype(np.uint16)
    for number, part in enumerate(chart):
        # Cropped clusters are the largest ones, and so the first ones of every tile.
        shown = int(groups.cropped[part.clusters].sum())
        found = {cut.slot: cut.tile for cut in covers.take(number).get(number, [])}
        for start in range(0, shown, COVERS):
            count = min(COVERS, shown - start)
            tiles = {slot - start: tile for slot, tile in found.items() if 0 <= slot - start < count}
            path = site / "sheets" / "map" / f"{part.name}-{start // COVERS}.jpg"
            write_sheet(path, tiles, count, COVER_SIDE, COVER_COLUMNS)
        content = {
            "id": packed(part.clusters.astype(np.int32)),
            "x": packed(xy[part.clusters, 0]),
            "y": packed(xy[part.clusters, 1]),
            "size": packed(np.minimum(groups.sizes[part.clusters], 2**31 - 1).astype(np.int32)),
            "tint": packed(places.tint[part.clusters]),
            "covers": shown,
        }
        write_chunk(site, f"map/{part.name}", content)
        tick(len(part.clusters))


class SamplePages:
    """Writes images/ and samples/N while samples come in; then samples/index, by which the page finds them.

    Args:
        site: The atlas's folder.
    """

    def __init__(self, site: Path) -> None:
        self._site = site
        self._numbers: list[int] = []
        self._keys: list[str] = []
        self._waiting: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, description: dict[str, Any], jpeg: bytes) -> None:
        """Take one sample in."""
        folder = self._site / "images" / str(len(self) // DIRECTORY)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{description['n']}.jpg").write_bytes(jpeg)
        self._numbers.append(description["n"])
        self._keys.append(description["key"])
        self._waiting.append(description)
        if len(self._waiting) == CHUNK:
            self._write()

    def finish(self) -> None:
        """Write what is left, and the index."""
        if self._waiting:
            self._write()
        content = {"n": packed(np.array(self._numbers, dtype=np.int64).astype(np.uint32)), "key": self._keys}
        write_chunk(self._site, "samples/index", content)

    def _write(self) -> None:
        write_chunk(self._site, f"samples/{(len(self) - 1) // CHUNK}", self._waiting)
        self._waiting = []


def _write_group_sheets(
    site: Path, kind: str, groups: Groups, numbers: range, cuts: Mapping[int, list[Cut]], side: int
) -> None:
    """Write the sheets of some groups; one all of whose images are damaged has a grey sheet."""
    for number in numbers:
        if groups.cropped[number]:
            nearest, random = groups.shown(number)
            path = site / "sheets" / kind / str(number // DIRECTORY) / f"{number}.jpg"
            tiles = {cut.slot: cut.tile for cut in cuts.get(number, [])}
            write_sheet(path, tiles, nearest.stop + random.stop, side, COLUMNS)


def _members(groups: Groups, number: int, cuts: Sequence[Cut]) -> list[list[int]]:
    """Sample, region, cosine and box in the tile of each member; first the nearest, then the random ones.

    The box is four zeros where there is no tile.
    """
    boxes = {cut.slot: cut.tile.box for cut in cuts}
    nearest, random = groups.shown(number)
    both: list[list[int]] = []
    slot = 0
    for members, shown in ((groups.nearest, nearest), (groups.random, random)):
        flat: list[int] = []
        if members is not None:
            for place in range(shown.stop):
                flat += _member(members, number, place, boxes.get(slot, (0, 0, 0, 0)))
                slot += 1
        both.append(flat)
    return both


def _member(members: Members, number: int, place: int, box: tuple[int, int, int, int]) -> list[int]:
    sample, region = int(members.sample[number, place]), int(members.region[number, place])
    return [sample, region, permille(members.closeness[number, place]), *box]
