"""The map: where each cluster lies, and the tiles in which a browser loads them.

Places are the centers along their principal axes, or UMAP's where it is installed. The tiles are a quadtree
whose upper ones hold the largest clusters, so that any view needs few: tile L-X-Y covers square (X, Y) of the
2**L x 2**L into which level L cuts the map, and each cluster is in just one tile, the highest that has room
when the larger ones have been seated.

Shapes: K centers of C channels, A axes.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaregion.atlas.settings import MapKind
from megaregion.atlas.source import Floats, Integers

BLOCK = 65_536
"""Centers that are held in memory at once."""
AXES = 64
"""Principal axes that are computed; also what the search for neighbours looks at first."""
MARGIN = 0.03
"""Share of the map's side that stays free on each side."""
ROOM = 1024
"""Clusters of one tile."""
LEVELS = 16
"""Deepest level; clusters that coincide even there make its tiles larger."""
DENSITY = 192
"""Side, in cells, of the density that is drawn under the points."""


@dataclass(frozen=True)
class Places:
    """Where each cluster lies on the map."""

    position: Floats
    """x and y in 0..1, [K, 2]."""
    tint: NDArray[np.uint8]
    """Rank along the third axis, 0..255, [K]: a colour that adds what two axes cannot show."""


def principal_axes(centers: Floats) -> Floats:
    """The centers along their first axes, [K, A], A = min(C, 64); reads them twice, block by block."""
    channels = centers.shape[1]
    total, square = np.zeros(channels), np.zeros((channels, channels))
    for start in range(0, len(centers), BLOCK):
        block = np.asarray(centers[start : start + BLOCK], dtype=np.float64)
        total += block.sum(axis=0)
        square += block.T @ block
    mean = total / len(centers)
    _, vectors = np.linalg.eigh(square / len(centers) - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, :AXES]
    # An axis has no direction of its own: point its greatest part upwards, so that maps do not flip.
    greatest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    axes = (axes * np.where(greatest < 0, -1, 1)).astype(np.float32)
    projected = np.empty((len(centers), axes.shape[1]), dtype=np.float32)
    for start in range(0, len(centers), BLOCK):
        block = np.asarray(centers[start : start + BLOCK], dtype=np.float32)
        projected[start : start + BLOCK] = (block - mean.astype(np.float32)) @ axes
    return projected


def place_clusters(axes: Floats, kind: MapKind, seed: int) -> Places:
    """Lay the clusters out.

    Args:
        axes: From :func:`principal_axes`, [K, A].
        kind: pca takes the first two axes; umap unfolds all of them.
        seed: Seed of UMAP.
    """
    third = axes[:, 2] if axes.shape[1] > 2 else np.zeros(len(axes), dtype=np.float32)
    rank = np.empty(len(axes), dtype=np.int64)
    rank[np.argsort(third, kind="stable")] = np.arange(len(axes))
    tint = (rank * 255 // max(len(axes) - 1, 1)).astype(np.uint8)
    flat = _unfold(axes, seed) if kind == "umap" else np.zeros((len(axes), 2), dtype=np.float32)
    if kind == "pca":
        flat[:, : axes.shape[1]] = axes[:, :2]
    low, high = flat.min(axis=0), flat.max(axis=0)
    # One scale for both axes, or distances along them could not be compared.
    scale = (1 - 2 * MARGIN) / max(float((high - low).max()), 1e-12)
    return Places(((flat - (low + high) / 2) * scale + 0.5).astype(np.float32), tint)


def _unfold(axes: Floats, seed: int) -> Floats:
    umap = importlib.import_module("umap")
    # Fewer than four points have no neighbourhood to keep.
    if len(axes) < 4:
        return np.ascontiguousarray(np.pad(axes, ((0, 0), (0, 2)))[:, :2])
    neighbours = min(15, len(axes) - 1)
    model = umap.UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, init="pca", n_jobs=1)
    flat: Floats = np.asarray(model.fit_transform(axes), dtype=np.float32)
    return flat


@dataclass(frozen=True)
class MapTile:
    """One tile and its clusters, the largest first."""

    name: str
    clusters: Integers


def make_map_tiles(places: Places, sizes: Integers) -> list[MapTile]:
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
