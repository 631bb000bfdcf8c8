"""Collectives of the head: rows are gathered over the data-parallel ranks, gradients summed over all.

Every rank scores all rows of the micro-step against its own classes. The rows are gathered over the
data-parallel group alone (tensor-parallel ranks already hold the same rows), in the order of data
ranks, which is the order of sample positions.

Gradient contract: what a rank computes for a row is the part that its classes give. The gather's backward
sums the parts over the world, takes the rank's own rows and multiplies by the number of data ranks, since
the training engine then averages over them.

Shapes: r rows on this rank, R rows over all data ranks, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate equally many rows of each rank in rank order.

    Args:
        rows: This rank's rows, [r, ...]; the shape is the same on every rank.
        group: The ranks.

    Returns:
        All rows, [R, ...], without gradient.
    """
    gathered = rows.new_empty((rows.shape[0] * group.size(), *rows.shape[1:]))
    dist.all_gather_single(gathered, rows.contiguous(), group=group)
    return gathered


@dataclass(frozen=True)
class GatheredFeatures:
    """Normalised features of a micro-step's rows over all data ranks; both heads share one gather."""

    rows: Tensor
    """Unit rows (zero where the feature is zero), with gradient, [R, E]."""
    local_rows: int
    """Rows that each data rank brought."""


def gather_features(
    features: Tensor, world_group: dist.ProcessGroup, data_group: dist.ProcessGroup
) -> GatheredFeatures:
    """Normalise this rank's features and gather those of all data ranks.

    Args:
        features: Region embeddings of this rank's rows, with gradient, [r, E].
        world_group: All ranks.
        data_group: This rank's data-parallel ranks.
    """
    unit = _UnitRows.apply(features)
    return GatheredFeatures(_GatherRows.apply(unit, world_group, data_group), features.shape[0])


def unit_scale(rows: Tensor) -> Tensor:
    """The factor that gives each row length 1, [rows, 1]: 0 for a row of zeros, NaN for one not finite."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    tiny = torch.finfo(norm.dtype).tiny ** 0.5
    # norm - norm is 0, but NaN where the norm overflows: such a row must not pass as a row of zeros.
    return torch.where(norm > tiny, norm.reciprocal(), 0.0) + (norm - norm)


class _UnitRows(torch.autograd.Function):
    """L2 normalisation whose gradient at a row of zeros is zero, not the 1e12 of a clamped norm."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        scale = unit_scale(wide)
        unit = wide * scale
        ctx.save_for_backward(unit, scale)
        return unit.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        unit, scale = ctx.saved_tensors
        wide = gradient.to(unit.dtype)
        along = (wide * unit).sum(1, keepdim=True)
        return ((wide - along * unit) * scale).to(gradient.dtype)


class _GatherRows(torch.autograd.Function):
    """All-gather over the data group; backward sums over the world as the gradient contract says."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: dist.ProcessGroup, data: dist.ProcessGroup) -> Tensor:
        ctx.groups = world, data
        return gather_rows(rows, data)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        world, data = ctx.groups
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=world)
        local = total.shape[0] // data.size()
        own = total[data.rank() * local : (data.rank() + 1) * local]
        return own * data.size(), None, None
