"""The data of every kind of page, written chunk by chunk; the scripts in site/ read just these.

A page opened from a file may not fetch, but it may load a script that brings its data: a chunk is
data/NAME.js and calls ``atlas("NAME", content)``.

Shapes: K clusters, V tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.centers import Neighbours, Places
from megaregion.atlas.crops import COVER_SIDE, Cropped, Cut, Spool, make_cover, write_sheet
from megaregion.atlas.groups import Groups
from megaregion.atlas.source import Integers

CHUNK = 64
"""Clusters, tokens or samples of a chunk."""
DIRECTORY = 256
"""Files of a folder of sheets or images."""
ORDER_CHUNK = 4080
"""Clusters of a chunk of an order: a whole number of the list's pages of 48."""
COVERS = 256
"""Tiles of a map sheet; map.js knows it too."""
COLUMNS = 6
"""Tiles in each row of a group's sheet; dom.js knows it too."""
COVER_COLUMNS = 16
"""Tiles in each row of a map sheet; map.js knows it too."""
Tick = Callable[[int], object]
Cuts = dict[int, list[Cut]]
"""Tiles by their group, in the order of their slots."""


@dataclass(frozen=True)
class Content:
    """What the pages tell, besides samples and pictures."""

    clusters: Groups
    tokens: Groups
    pieces: Sequence[str]
    """The text of each token, V."""
    places: Places
    map_tiles: dict[str, Integers]
    """Clusters by the name of their tile."""
    near: Neighbours


class Pages:
    """Writes the pages of an atlas into its folder; pictures on their way lie in an empty one."""

    def __init__(self, site: Path, scratch: Path, tile: int, content: Content) -> None:
        self._site, self._tile, self._content = site, tile, content
        self._clusters, self._tokens = Spool(scratch / "clusters", CHUNK), Spool(scratch / "tokens", CHUNK)
        self._covers = Spool(scratch / "covers", 1)
        self._xy = np.round(content.places.position * 65_535).astype(np.uint16)
        self._samples: list[dict[str, Any]] = []
        self._numbers: list[int] = []
        self._keys: list[str] = []

    def add(self, found: Cropped) -> None:
        """Take in what was cut from some samples; samples/N is written when enough have come."""
        for spool, cuts in zip((self._clusters, self._tokens), found.cuts, strict=True):
            spool.add(cuts)
        for description, jpeg in found.browsed:
            folder = self._site / "images" / str(len(self._numbers) // DIRECTORY)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{description['n']}.jpg").write_bytes(jpeg)
            self._numbers.append(description["n"])
            self._keys.append(description["key"])
            self._samples.append(description)
            if len(self._samples) == CHUNK:
                self._write_samples()

    def finish_samples(self) -> int:
        """Write the last samples, and samples/index, by which the page finds them; gives their number."""
        if self._samples:
            self._write_samples()
        numbers = np.array(self._numbers, dtype=np.uint32)
        self.write_chunk("samples/index", {"n": packed(numbers), "key": self._keys})
        return len(numbers)

    def _write_samples(self) -> None:
        self.write_chunk(f"samples/{(len(self._numbers) - 1) // CHUNK}", self._samples)
        self._samples = []

    def write_clusters(self, tick: Tick) -> None:
        """Write clusters/N and the clusters' sheets, and cut what the map shows of them."""
        groups = self._content.clusters
        seats = np.zeros((len(groups.sizes), 2), dtype=np.int32)
        for number, clusters in enumerate(self._content.map_tiles.values()):
            seats[clusters, 0] = number
            seats[clusters, 1] = np.arange(len(clusters))
        for numbers, cuts, content in self._chunks("clusters", groups, self._clusters):
            for number, own in cuts.items():
                if own[0].slot == 0:
                    tile, place = seats[number].tolist()
                    self._covers.add([Cut(tile, place, make_cover(own[0].tile))])
            span = slice(numbers.start, numbers.stop)
            content |= {
                "mean": [permille(value) for value in groups.closeness[span]],
                "x": self._xy[span, 0].tolist(),
                "y": self._xy[span, 1].tolist(),
                "near": [_flat_neighbours(groups, self._content.near, number) for number in numbers],
            }
            self.write_chunk(f"clusters/{numbers.start // CHUNK}", content)
            tick(len(numbers))

    def write_tokens(self, tick: Tick) -> None:
        """Write tokens/N, the tokens' sheets, and tokens/index, by which the page searches."""
        groups = self._content.tokens
        for numbers, cuts, content in self._chunks("tokens", groups, self._tokens):
            content["texts"] = [{cut.slot: cut.text for cut in cuts.get(number, ())} for number in numbers]
            self.write_chunk(f"tokens/{numbers.start // CHUNK}", content)
            tick(len(numbers))
        index = {
            "piece": list(self._content.pieces),
            "size": groups.sizes.tolist(),
            "sheet": groups.cropped.astype(int).tolist(),
        }
        self.write_chunk("tokens/index", index)

    def _chunks(
        self, kind: str, groups: Groups, spool: Spool
    ) -> Iterator[tuple[range, Cuts, dict[str, Any]]]:
        """Write the sheets; give the numbers of each chunk, their tiles and what both kinds of pages tell."""
        for first in range(0, len(groups.sizes), CHUNK):
            numbers = range(first, min(first + CHUNK, len(groups.sizes)))
            cuts = spool.take(first // CHUNK)
            for number in numbers:
                if groups.cropped[number]:
                    # One all of whose images are damaged has a grey sheet.
                    path = self._site / "sheets" / kind / str(number // DIRECTORY) / f"{number}.jpg"
                    found = {cut.slot: cut.tile for cut in cuts.get(number, ())}
                    write_sheet(path, found, int(groups.shown[number].sum()), self._tile, COLUMNS)
            content = {
                "size": groups.sizes[first : numbers.stop].tolist(),
                "sheet": groups.cropped[first : numbers.stop].astype(int).tolist(),
                "members": [_flat_members(groups, number, cuts.get(number, ())) for number in numbers],
            }
            yield numbers, cuts, content

    def write_orders(self, tick: Tick) -> None:
        """Write orders/NAME/N, the lists of clusters: by number, the largest first, the loosest first."""
        groups = self._content.clusters
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
                    "size": _packed_sizes(groups.sizes[part]),
                    "mean": packed(means),
                    "sheet": packed(groups.cropped[part].astype(np.uint8)),
                }
                self.write_chunk(f"orders/{name}/{start // ORDER_CHUNK}", content)
                tick(len(part))

    def write_map(self, tick: Tick) -> None:
        """Write map/NAME for every tile of the map, and its sheets of covers."""
        groups = self._content.clusters
        for number, (name, clusters) in enumerate(self._content.map_tiles.items()):
            # Cropped clusters are the largest ones, and so the first ones of every tile.
            shown = int(groups.cropped[clusters].sum())
            found = {cut.slot: cut.tile for cut in self._covers.take(number).get(number, ())}
            for start in range(0, shown, COVERS):
                count = min(COVERS, shown - start)
                tiles = {slot - start: tile for slot, tile in found.items() if 0 <= slot - start < count}
                path = self._site / "sheets" / "map" / f"{name}-{start // COVERS}.jpg"
                write_sheet(path, tiles, count, COVER_SIDE, COVER_COLUMNS)
            content = {
                "id": packed(clusters.astype(np.int32)),
                "x": packed(self._xy[clusters, 0]),
                "y": packed(self._xy[clusters, 1]),
                "size": _packed_sizes(groups.sizes[clusters]),
                "tint": packed(self._content.places.tint[clusters]),
                "covers": shown,
            }
            self.write_chunk(f"map/{name}", content)
            tick(len(clusters))

    def write_chunk(self, name: str, content: Any) -> None:
        """Write one chunk, named as clusters/12; a ValueError where a number in it is not finite."""
        path = self._site / "data" / f"{name}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        # ASCII alone: whatever a text region reads, the file has no letter that ends a line or a script.
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        path.write_bytes(f"atlas({json.dumps(name)},{text})\n".encode("ascii"))


def packed(values: NDArray[Any]) -> str:
    """An array's bytes, little endian, in base64: half as large as its digits, and read at once."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def permille(value: float) -> int:
    """A cosine in thousandths; -1000 and less where it is not known."""
    return round(float(value) * 1000) if np.isfinite(value) else -2000


def _packed_sizes(sizes: NDArray[np.int64]) -> str:
    return packed(np.minimum(sizes, 2**31 - 1).astype(np.int32))


def _flat_neighbours(groups: Groups, near: Neighbours, number: int) -> list[int]:
    """Number, cosine, size and sheet of each neighbour, one after the other."""
    flat: list[int] = []
    for other, cosine in zip(near.cluster[number].tolist(), near.cosine[number].tolist(), strict=True):
        if other >= 0:
            flat += [other, permille(cosine), int(groups.sizes[other]), int(groups.cropped[other])]
    return flat


def _flat_members(groups: Groups, number: int, cuts: Sequence[Cut]) -> list[list[int]]:
    """Sample, region, cosine and box in the tile of each member; first the nearest, then the random ones.

    The box is four zeros where there is no tile.
    """
    boxes = {cut.slot: cut.tile.box for cut in cuts}
    both: list[list[int]] = []
    slot = 0
    for table, shown in zip(groups.members, groups.shown[number].tolist(), strict=True):
        flat: list[int] = []
        for _, sample, region, closeness in table[number, :shown].tolist():
            flat += [sample, region, permille(closeness), *boxes.get(slot, (0, 0, 0, 0))]
            slot += 1
        both.append(flat)
    return both
