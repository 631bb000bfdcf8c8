"""Neighbouring clusters: the centers with the greatest cosine to each; exact where they are few.

Many are first sorted into cells around a sample of them; candidates come from the nearest cells and are
looked at along the principal axes, and only the best of them are compared in full.

Shapes: K centers of C channels, A axes, n neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaregion.atlas.source import Floats, mix

EXACT = 20_000
"""Up to so many centers, all pairs are compared."""
BLOCK = 1024
"""Centers that search at once."""
PROBES = 8
"""Nearest cells that a center searches, its own included."""
CANDIDATES = 4
"""Candidates that are compared in full, for each neighbour that is wanted."""


class Neighbours(NamedTuple):
    """The nearest clusters of every cluster, the nearest first."""

    cluster: NDArray[np.int32]
    """[K, n]; -1 where there are fewer."""
    cosine: Floats
    """[K, n]"""


def find_neighbours(
    centers: Floats, axes: Floats, wanted: int, tick: Callable[[int], object], exact: int = EXACT
) -> Neighbours:
    """Find the neighbours of every center.

    Args:
        centers: [K, C], of any length; may be mapped from a file.
        axes: Along the principal axes, [K, A].
        wanted: Neighbours of each, n.
        tick: Called with the number of centers that were done.
        exact: Greatest number of centers for which all pairs are compared.
    """
    found = Neighbours(
        np.full((len(centers), wanted), -1, dtype=np.int32),
        np.zeros((len(centers), wanted), dtype=np.float32),
    )
    search = _all_pairs(centers, wanted) if len(centers) <= exact else _cells(centers, axes, wanted)
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
    for start in range(0, len(vectors), BLOCK):
        rows = torch.arange(start, min(start + BLOCK, len(vectors)))
        scores = vectors[rows] @ vectors.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        cosine, cluster = scores.topk(count, dim=1)
        yield rows.numpy(), cluster, cosine


def _cells(centers: Floats, axes: Floats, wanted: int) -> Iterator[_Found]:
    vectors = _unit(axes)
    count = round(2 * len(vectors) ** 0.5)
    pivots = vectors[torch.from_numpy(np.sort(np.argsort(mix(np.arange(len(vectors)), 0))[:count]))]
    # Two rounds of k-means on the pivots: without them cells of dense places are twice as large.
    for _ in range(2):
        nearest = torch.cat([(block @ pivots.T).argmax(dim=1) for block in vectors.split(16 * BLOCK)])
        sums = torch.zeros_like(pivots).index_add_(0, nearest, vectors)
        pivots = torch.where(sums.norm(dim=1, keepdim=True) > 0, _unit_rows(sums), pivots)
    nearest = torch.cat([(block @ pivots.T).argmax(dim=1) for block in vectors.split(16 * BLOCK)])
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
        for rows in members.split(BLOCK):
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
    return _unit_rows(torch.from_numpy(np.array(vectors, dtype=np.float32)))


def _unit_rows(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)
