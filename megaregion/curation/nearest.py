"""The nearest of all centers, exactly, without ever writing all scores.

Tiles of scores are products with a running best and second best. Where the two are closer than the product's
rounding, the vector is scored again in the next precision, up to float64: so labels do not depend on
precision, blocks, threads, device or library. A scan takes little more than its products, as Faiss's exact
search does: only bounds of an earlier pass (kmeans.py) leave most of them out.

Shapes: n vectors and K centers of C channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megaregion.processor import in_order, product

TILE = {"cpu": (1024, 2048), "cuda": (16_384, 32_768)}
"""Vectors and centers that are scored at once; a processor's scores stay in its cache."""
LADDER = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float16, torch.float32, torch.float64)}
"""Precisions of the products, rising."""
ROUNDING = {torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""How far two scores of unit vectors may be off from each other: closer ones are scored again, or equal."""


class Nearest(NamedTuple):
    """Of each vector the nearest center, int64 [n], the cosine to it, and what no other's exceeds, [n]."""

    labels: Tensor
    best: Tensor
    other: Tensor
    """-inf where there is no other center."""


def nearest(vectors: Tensor, centers: Tensor, but: Tensor | None = None) -> Nearest:
    """The nearest center of each vector, both unit vectors; of equally near ones the first.

    With ``but``, int64 [n] or [n, m], the centers that each vector may not choose.
    """
    n, device = len(vectors), vectors.device
    labels = torch.zeros(n, dtype=torch.int64, device=device)
    other = torch.full((n,), -torch.inf, device=device)
    rows = torch.arange(n, device=device)
    for precision in LADDER[device.type]:
        if len(rows):
            part = vectors if len(rows) == n else vectors[rows]
            found = scan(part.to(precision), centers.to(precision), None if but is None else but[rows])
            labels[rows] = found.labels
            other[rows] = found.other.float() + max(ROUNDING[precision], ROUNDING[torch.float32])
            rows = rows[(found.best - found.other) < ROUNDING[precision]]
    return Nearest(labels, dot(vectors, centers[labels]), other)


def dot(some: Tensor, others: Tensor) -> Tensor:
    """Row by row, [n]: the same bits whatever the rows beside."""
    return (some * others).sum(1)


def scan(vectors: Tensor, centers: Tensor, but: Tensor | None = None) -> Nearest:
    """What :func:`nearest` finds with the scores of one precision, that of vectors and centers."""
    height, width = TILE[vectors.device.type]
    tie = ROUNDING[torch.float64] if vectors.dtype == torch.float64 else 0.0

    def block(start: int) -> Nearest:
        rows = vectors[start : start + height]
        best = rows.new_full((len(rows),), -torch.inf)
        second, labels = best.clone(), torch.zeros_like(best, dtype=torch.int64)
        for first in range(0, len(centers), width):
            scores = product(rows, centers[first : first + width])
            if but is not None:
                place = but[start : start + height].view(len(rows), -1) - first
                here, which = ((place >= 0) & (place < scores.shape[1])).nonzero().unbind(1)
                scores[here, place[here, which]] = -torch.inf
            place = _first(scores >= scores.amax(1, keepdim=True) - tie) if tie else _first(scores)
            value = scores.gather(1, place[:, None])[:, 0]
            scores.scatter_(1, place[:, None], -torch.inf)
            second = torch.maximum(torch.maximum(second, scores.amax(1)), torch.minimum(best, value))
            labels = torch.where(value > best + tie, place + first, labels)
            best = torch.maximum(best, value)
        return Nearest(labels, best, second)

    found = in_order(block, range(0, len(vectors), height))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _first(scores: Tensor) -> Tensor:
    """Place of the first greatest of each row; on a processor numpy's is six times as fast as torch's."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.to(torch.uint8).argmax(1) if scores.dtype == torch.bool else scores.argmax(1)
