"""The map in tiles: a quadtree whose upper tiles hold the largest clusters, so that any view needs few.

Tile L-X-Y covers square (X, Y) of the 2**L x 2**L into which level L cuts the map. Each cluster is in just
one tile: the highest that has room when the larger ones have been seated.

Shapes: K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.projection import Places
from megaregion.atlas.source import Integers

ROOM = 1024
"""Clusters of one tile."""
LEVELS = 16
"""Deepest level; clusters that coincide even there make its tiles larger."""
DENSITY = 192
"""Side, in cells, of the density that is drawn under the points."""


@dataclass(frozen=True)
class MapTile:
    """One tile and its clusters, the largest first."""

    name: str
    clusters: Integers


def seat(places: Places, sizes: Integers) -> list[MapTile]:
    """Distribute the clusters over the tiles.

    Args:
        places: Where each lies.
        sizes: Regions of each, [K].
    """
    # A place within 1 / 2**LEVELS of the border must not fall off it.
    cells = np.minimum((places.position.astype(np.float64) * 2**LEVELS).astype(np.int64), 2**LEVELS - 1)
    waiting = np.argsort(-sizes, kind="stable")
    tiles: list[MapTile] = []
    for level in range(LEVELS + 1):
        if not len(waiting):
            break
        x, y = (cells[waiting, axis] >> (LEVELS - level) for axis in (0, 1))
        tile = y * 2**level + x
        # Stable, so that the largest stay first within each tile.
        order = np.argsort(tile, kind="stable")
        starts = np.flatnonzero(np.diff(tile[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        seated = (rank < ROOM) | (level == LEVELS)
        for part in np.split(order[seated], np.flatnonzero(rank[seated] == 0)[1:]):
            first = part[0]
            tiles.append(MapTile(f"{level}-{x[first]}-{y[first]}", waiting[part]))
        standing = np.ones(len(waiting), dtype=bool)
        standing[order[seated]] = False
        waiting = waiting[standing]
    return tiles


def density(places: Places) -> NDArray[np.uint8]:
    """How many clusters lie in each cell of the map, on a logarithmic scale, [192, 192], row by row."""
    cells = np.clip((places.position * DENSITY).astype(np.int64), 0, DENSITY - 1)
    count = np.bincount(cells[:, 1] * DENSITY + cells[:, 0], minlength=DENSITY**2)
    logs = np.log1p(count)
    return (logs / max(float(logs.max()), 1e-9) * 255).astype(np.uint8).reshape(DENSITY, DENSITY)
