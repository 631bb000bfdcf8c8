"""Cosine filters for the patch embedding, scaled so that natural images give them equal power.

A trained patch embedding looks like smooth colour blobs and gratings, the principal components of natural
patches, and those are close to a cosine basis. A long run finds them by itself; a run of minutes should
not have to.

Shapes: D filters, p pixels along a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OPPONENTS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, red against blue, green against both: nearly uncorrelated in natural images."""
CHROMA = 3.0
"""Brightness varies about this many times as much as the colour axes do."""


def cosine_filters(count: int, patch: int) -> Tensor:
    """The filters with the most power in natural images, whitened, float32 [D, 3, p, p].

    Power falls with the square of the frequency, so each filter is multiplied by its frequency. Beyond
    the 3 p^2 filters there are, the list starts again.

    Args:
        count: D.
        patch: p.
    """
    basis = _cosines(patch)
    axes = [(u, v, c) for u in range(patch) for v in range(patch) for c in range(3)]
    axes.sort(key=lambda axis: (_gain(*axis), axis))
    filters = torch.empty(count, 3, patch, patch)
    for index in range(count):
        u, v, c = axes[index % len(axes)]
        colour = torch.tensor(OPPONENTS[c])
        plane = torch.outer(basis[u], basis[v])
        filters[index] = (colour / colour.norm())[:, None, None] * plane * _gain(u, v, c) / patch
    return filters


def _gain(u: int, v: int, c: int) -> float:
    return (1.0 + math.hypot(u, v)) * (CHROMA if c else 1.0)


def _cosines(patch: int) -> Tensor:
    """Orthonormal cosines, [p frequencies, p pixels]."""
    position = (torch.arange(patch) + 0.5) * math.pi / patch
    basis = torch.cos(torch.arange(patch)[:, None] * position[None, :])
    basis *= math.sqrt(2 / patch)
    basis[0] *= math.sqrt(0.5)
    return basis
