"""The centers: where each lies on the map, the tiles in which a browser loads the map, and its neighbours.

Places are the centers along their principal axes, or UMAP's where it is installed. The tiles are a quadtree
whose upper ones hold the largest clusters, so that any view needs few: tile L-X-Y covers square (X, Y) of the
2**L x 2**L into which level L cuts the map, and each cluster is in just one tile, the highest that has room
when the larger ones have been seated.

Neighbours are the centers with the greatest cosine, exact where centers are few. Many are first sorted into
cells around a sample of them; candidates come from the nearest cells and are looked at along the principal
axes, and only the best of them are compared in full.

Shapes: K centers of C channels, A axes, n neighbours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from megaregion.atlas.settings import MapKind
from megaregion.atlas.source import Floats, Integers, rank_within
from megaregion.data.order import mix

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
EXACT = 20_000
"""Up to so many centers, all pairs are compared."""
SEARCHED = 1024
"""Centers that search at once."""
PROBES = 8
"""Nearest cells that a center searches, its own included."""
CANDIDATES = 4
"""Candidates that are compared in full, for each neighbour that is wanted."""


class Places(NamedTuple):
    """Where each cluster lies on the map."""

    position: Floats
    """x and y in 0..1, [K, 2]."""
    tint: NDArray[np.uint8]
    """Rank along the third axis, 0..255, [K]: a colour that adds what two axes cannot show."""


class Neighbours(NamedTuple):
    """The nearest clusters of every cluster, the nearest first."""

    cluster: NDArray[np.int32]
    """[K, n]; -1 where there are fewer."""
    cosine: Floats
    """[K, n]"""


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
    """Lay the clusters out by their principal axes, [K, A]: pca takes two, umap unfolds all by a seed."""
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


def make_map_tiles(position: Floats, sizes: Integers) -> dict[str, Integers]:
    """Distribute the clusters, which lie at [K, 2] and have so many regions, [K], over the tiles.

    Gives the clusters of each tile, the largest first, by its name; upper tiles first.
    """
    # A place within 1 / 2**LEVELS of the border must not fall off it.
    cells = np.minimum((position.astype(np.float64) * 2**LEVELS).astype(np.int64), 2**LEVELS - 1)
    waiting = np.argsort(-sizes, kind="stable")
    tiles = {}
    for level in range(LEVELS + 1):
        if not len(waiting):
            break
        x, y = (cells[waiting, axis] >> (LEVELS - level) for axis in (0, 1))
        tile = y * 2**level + x
        # Stable, so that the largest stay first within each tile.
        order = np.argsort(tile, kind="stable")
        rank = rank_within(tile[order])
        seated = (rank < ROOM) | (level == LEVELS)
        for part in np.split(order[seated], np.flatnonzero(rank[seated] == 0)[1:]):
            tiles[f"{level}-{x[part[0]]}-{y[part[0]]}"] = waiting[part]
        waiting = np.delete(waiting, order[seated])
    return tiles


def density(position: Floats) -> NDArray[np.uint8]:
    """How many clusters lie in each cell of the map, on a logarithmic scale, [192, 192], row by row."""
    cells = np.clip((position * DENSITY).astype(np.int64), 0, DENSITY - 1)
    count = np.bincount(cells[:, 1] * DENSITY + cells[:, 0], minlength=DENSITY**2)
    logs = np.log1p(count)
    return (logs / max(float(logs.max()), 1e-9) * 255).astype(np.uint8).reshape(DENSITY, DENSITY)


def find_neighbours(centers: Floats, axes: Floats, wanted: int, tick: Callable[[int], object]) -> Neighbours:
    """The n wanted neighbours of every center.

    Centers, [K, C], may have any length and be mapped from a file; axes are theirs, [K, A]. ``tick`` is
    called with the number of centers that were done.
    """
    found = Neighbours(
        np.full((len(centers), wanted), -1, dtype=np.int32),
        np.zeros((len(centers), wanted), dtype=np.float32),
    )
    search = _all_pairs(centers, wanted) if len(centers) <= EXACT else _cells(centers, axes, wanted)
    for rows, cluster, cosine in search:
        found.cluster[rows, : cluster.shape[1]] = cluster.numpy()
        found.cosine[rows, : cluster.shape[1]] = cosine.numpy()
        tick(len(rows))
    return found


_Found = tuple[NDArray[np.int64], Tensor, Tensor]
"""Rows, their neighbours and the cosines."""


def _all_pairs(centers: Floats, wanted: int) -> Iterator[_Found]:
    vectors = _unit(centers)
    count = min(wanted, len(vectors) - 1)
    for start in range(0, len(vectors), SEARCHED):
        rows = torch.arange(start, min(start + SEARCHED, len(vectors)))
        scores = vectors[rows] @ vectors.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        cosine, cluster = scores.topk(count, dim=1)
        yield rows.numpy(), cluster, cosine


def _cells(centers: Floats, axes: Floats, wanted: int) -> Iterator[_Found]:
    vectors = _unit(axes)
    count = round(2 * len(vectors) ** 0.5)
    pivots = vectors[torch.from_numpy(np.sort(np.argsort(mix(np.arange(len(vectors)), 0))[:count]))]

    def assign() -> Tensor:
        return torch.cat([(block @ pivots.T).argmax(dim=1) for block in vectors.split(16 * SEARCHED)])

    # Two rounds of k-means on the pivots: without them cells of dense places are twice as large.
    for _ in range(2):
        sums = torch.zeros_like(pivots).index_add_(0, assign(), vectors)
        pivots = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums), pivots)
    nearest = assign()
    order = nearest.argsort(stable=True)
    sizes = torch.bincount(nearest, minlength=count)
    cells = order.split(sizes.tolist())
    beside = (pivots @ pivots.T).topk(PROBES, dim=1).indices
    for cell, members in enumerate(cells):
        if not len(members):
            continue
        pool = torch.cat([cells[other] for other in beside[cell].tolist()])
        if len(pool) == 1:
            continue
        for rows in members.split(SEARCHED):
            scores = vectors[rows] @ vectors[pool].T
            scores[rows[:, None] == pool] = -torch.inf
            kept = min(CANDIDATES * wanted, len(pool) - 1)
            candidates = pool[scores.topk(kept, dim=1).indices]
            yield _compare(centers, rows, candidates, min(wanted, kept))


def _compare(centers: Floats, rows: Tensor, candidates: Tensor, wanted: int) -> _Found:
    """Compare rows with their candidates, [b, c], in all channels."""
    # Each candidate once, in rising order: so a mapped file likes to be read.
    distinct, places = candidates.unique(return_inverse=True)
    own, others = _unit(centers[rows.numpy()]), _unit(centers[distinct.numpy()])
    scores = torch.einsum("bc,bkc->bk", own, others[places])
    cosine, best = scores.topk(wanted, dim=1)
    return rows.numpy(), candidates.gather(1, best), cosine


def _unit(vectors: Floats) -> Tensor:
    return normalize(torch.from_numpy(np.array(vectors, dtype=np.float32)))
