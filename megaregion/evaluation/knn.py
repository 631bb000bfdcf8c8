"""Region k-NN: name a region after its nearest neighbours among named ones.

Cosine similarity, k neighbours, majority vote; of classes with equally many votes, the one whose votes
are the more similar in sum. Two numbers stand side by side:

- test: regions of held-out scenes (cut-outs never trained on) against a gallery of training regions;
- train: the gallery's regions against the gallery itself, each without the regions of its own scene.
  The same cut-out stands in other training scenes and stays in: a network that has merely memorised its
  cut-outs scores high here and low on the test. The gap between the two is the memorising.

Shapes: Q queries, G gallery regions, C feature width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 5
"""Neighbours that vote."""

BLOCK_ROWS = 1024
"""Queries whose similarities to the whole gallery are in memory at once."""


BOOTSTRAPS = 1000
"""Draws behind an interval."""


@dataclass(frozen=True)
class Neighbours:
    """The K nearest gallery regions of each query, nearest first."""

    index: NDArray[np.int64]
    """[Q, K], rows of the gallery; -1 where the gallery had fewer regions to offer."""
    similarity: NDArray[np.float32]
    """[Q, K], cosines; -inf where index is -1."""


def nearest(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    query_group: NDArray[np.int64] | None = None,
    gallery_group: NDArray[np.int64] | None = None,
    neighbours: int = NEIGHBOURS,
) -> Neighbours:
    """Find the most similar gallery regions of each query.

    Args:
        queries: Features, [Q, C]; they need no normalisation, an all-zero row is similar to nothing.
        gallery: Features, [G, C].
        query_group: Groups of the queries, [Q]; given with gallery_group, a query never meets a gallery
            region of its own group (its scene).
        gallery_group: Groups of the gallery, [G].
        neighbours: K.

    Returns:
        Rows and cosines, [Q, K].
    """
    queries, gallery = _normalise(queries), _normalise(gallery)
    index = np.full((len(queries), neighbours), -1, np.int64)
    similarity = np.full((len(queries), neighbours), -np.inf, np.float32)
    for start in range(0, len(queries), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        cosine = queries[rows] @ gallery.T
        if query_group is not None and gallery_group is not None:
            cosine[query_group[rows, None] == gallery_group[None]] = -np.inf
        best = largest(cosine, neighbours)
        found = np.take_along_axis(cosine, best, axis=1)
        index[rows, : best.shape[1]] = np.where(np.isneginf(found), -1, best)
        similarity[rows, : best.shape[1]] = found
    return Neighbours(index, similarity)


def largest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Columns of the largest scores of each row, largest first; a row shorter than count gives all.

    Selects before it sorts: 15 times faster than a full sort of 4,000 columns.

    Args:
        scores: [Q, G].
        count: Columns wanted, K.

    Returns:
        Column numbers, [Q, min(K, G)]; of equal scores, the smaller column stands first.
    """
    if count < scores.shape[1]:
        chosen = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    else:
        chosen = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    chosen = np.sort(chosen, axis=1)
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def vote(neighbours: Neighbours, names: Sequence[str]) -> list[str]:
    """Name each query by the majority of its neighbours.

    Args:
        neighbours: Of Q queries.
        names: Class of each gallery region, G of them.

    Returns:
        Q names; "" for a query without neighbours.
    """
    return [
        _elect([names[i] for i in row if i >= 0], similarity)
        for row, similarity in zip(neighbours.index, neighbours.similarity, strict=True)
    ]


def accuracy(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Share of names that are right; 0 when there are none."""
    return float(np.mean([p == t for p, t in zip(predicted, true, strict=True)])) if true else 0.0


def interval(
    predicted: Sequence[str], true: Sequence[str], groups: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """95% interval of the accuracy, as it would vary over other test cut-outs.

    The same few cut-outs stand in many test scenes, so regions are not independent: whole groups are
    drawn with replacement (bootstrap), never single regions.

    Args:
        predicted: Names given, Q of them.
        true: True names.
        groups: The cut-out that each region shows.
        seed: Of the draws.

    Returns:
        Lower and upper end.
    """
    _, group = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True)
    right = np.asarray([p == t for p, t in zip(predicted, true, strict=True)], np.float64)
    if not len(right):
        return 0.0, 0.0
    hits, sizes = np.bincount(group, right), np.bincount(group)
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = rng.integers(len(sizes), size=(BOOTSTRAPS, len(sizes)))
    shares = hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def _elect(names: Sequence[str], similarity: NDArray[np.float32]) -> str:
    votes: dict[str, tuple[int, float]] = {}
    for name, cosine in zip(names, similarity, strict=False):
        count, total = votes.get(name, (0, 0.0))
        votes[name] = (count + 1, total + float(cosine))
    return max(votes, key=lambda name: votes[name], default="")


def _normalise(features: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norm, 1e-12)
