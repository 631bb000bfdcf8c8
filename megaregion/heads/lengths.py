"""Lengths of rows and centers, and what to do where there is none.

Shapes: R rows, C centers, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaregion.heads.portions import lines_at_a_time


def unit_scale(rows: Tensor) -> Tensor:
    """The factor that gives each row length 1, [R, 1]: 0 for a row of zeros, NaN for one not finite.

    Args:
        rows: Features, [R, E].
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    tiny = torch.finfo(norm.dtype).tiny ** 0.5
    # norm - norm is 0, but NaN where the norm overflows: such a row must not pass as a row of zeros.
    return torch.where(norm > tiny, norm.reciprocal(), 0.0) + (norm - norm)


def make_unit(centers: Tensor) -> Tensor:
    """Divide centers [C, E] by their lengths in place, as ``inverse_lengths`` has them; return them."""
    for part in centers.split(lines_at_a_time(centers)) if len(centers) else ():
        part.mul_(inverse_lengths(part)[:, None])
    return centers


def inverse_lengths(centers: Tensor) -> Tensor:
    """1 / length of each center, [C]; 1 for a center shorter than 1e-8, which thus scores 0 and can grow.

    Args:
        centers: Centers, [C, E].
    """
    lengths = torch.linalg.vector_norm(centers, dim=1)
    return torch.where(lengths > 1e-8, lengths.reciprocal(), 1.0)
