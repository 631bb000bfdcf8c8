"""Collectives of the head: rows are gathered over the data-parallel ranks, gradients go back to their owners.

Every rank scores all rows of the micro-step against its own classes. The rows are gathered over the
data-parallel group alone (tensor-parallel ranks already hold the same rows), in the order of data
ranks, which is the order of sample positions. They travel in their own type, bf16 when the body is bf16.

Gradient contract: what a rank computes for a row is the part that its classes give. The gather's backward
sums the parts over the world, gives each rank its own rows and multiplies by the number of data ranks,
since the training engine then averages over them. A reduce-scatter does so with half the traffic of an
all-reduce; with tensor parallelism it runs among the ranks of one tensor rank, and only the rank's own
rows, one data rank's share, are then summed inside the tensor-parallel group, which is one node's.

Shapes: r rows on this rank, R rows over all data ranks, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.lengths import unit_scale


def gather_rows(rows: Tensor, group: dist.ProcessGroup, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate the rows of all ranks in rank order.

    Args:
        rows: This rank's rows, [r, ...]; all but r is the same on every rank.
        group: The ranks.
        counts: Rows of each rank; None when all have as many as this one.

    Returns:
        All rows, [R, ...], without gradient.
    """
    if counts is None or len(set(counts)) == 1:
        gathered = rows.new_empty((rows.shape[0] * group.size(), *rows.shape[1:]))
        dist.all_gather_single(gathered, rows.contiguous(), group=group)
        return gathered
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    spread = gather_rows(padded, group).unflatten(0, (len(counts), max(counts)))
    return torch.cat([part[:count] for part, count in zip(spread, counts, strict=True)])


def scatter_sums(rows: Tensor, group: dist.ProcessGroup, counts: Sequence[int] | None = None) -> Tensor:
    """Sum what all ranks hold for each row and give every rank its own rows: the way back of the gather.

    Args:
        rows: Parts of all rows, [R, ...].
        group: The ranks.
        counts: Rows of each rank; None when all have as many.

    Returns:
        This rank's rows, [r, ...].
    """
    if counts is None or len(set(counts)) == 1:
        own = rows.new_empty((rows.shape[0] // group.size(), *rows.shape[1:]))
        dist.reduce_scatter_single(own, rows.contiguous(), group=group)
        return own
    padded = rows.new_zeros((len(counts), max(counts), *rows.shape[1:]))
    for place, part, count in zip(padded, rows.split(list(counts)), counts, strict=True):
        place[:count] = part
    return scatter_sums(padded.flatten(0, 1), group)[: counts[group.rank()]]


@dataclass(frozen=True)
class GatheredFeatures:
    """Normalised features of a micro-step's rows over all data ranks; both heads share one gather."""

    rows: Tensor
    """Unit rows (zero where the feature is zero), with gradient, [R, E]."""


def gather_features(
    features: Tensor,
    world_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
    tensor_group: dist.ProcessGroup | None = None,
    row_counts: Sequence[int] | None = None,
) -> GatheredFeatures:
    """Normalise this rank's features and gather those of all data ranks.

    Args:
        features: Region embeddings of this rank's rows, with gradient, [r, E].
        world_group: All ranks.
        data_group: This rank's data-parallel ranks.
        tensor_group: The ranks that hold the same rows; known, it lightens the way back.
        row_counts: Rows of each data rank; None when all bring as many.
    """
    route = _Route(world_group, data_group, tensor_group, row_counts)
    return GatheredFeatures(_GatherRows.apply(_UnitRows.apply(features), route))


class _UnitRows(torch.autograd.Function):
    """L2 normalisation whose gradient at a row of zeros is zero, not the 1e12 of a clamped norm."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        wide = _wide(rows)
        scale = unit_scale(wide)
        ctx.save_for_backward(rows, scale)
        return (wide * scale).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows, scale = ctx.saved_tensors
        unit, wide = _wide(rows) * scale, _wide(gradient)
        along = (wide * unit).sum(1, keepdim=True)
        return torch.addcmul(wide, along, unit, value=-1).mul_(scale).to(rows.dtype)


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


@dataclass(frozen=True)
class _Route:
    """The groups that rows and gradients travel through."""

    world: dist.ProcessGroup
    data: dist.ProcessGroup
    tensor: dist.ProcessGroup | None
    counts: Sequence[int] | None

    def send_back(self, parts: Tensor) -> Tensor:
        """Sum parts [R, E] over the world and keep this rank's rows, [r, E]."""
        if self.world.size() == self.data.size():
            return scatter_sums(parts, self.data, self.counts)
        if self.tensor is not None:
            own = scatter_sums(parts, self.data, self.counts)
            dist.all_reduce(own, group=self.tensor)
            return own
        total = parts.clone()
        dist.all_reduce(total, group=self.world)
        counts = self.counts or [len(total) // self.data.size()] * self.data.size()
        return total.split(list(counts))[self.data.rank()]


class _GatherRows(torch.autograd.Function):
    """All-gather over the data group; backward sums over the world as the gradient contract says."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route) -> Tensor:
        ctx.route = route
        return gather_rows(rows, route.data, route.counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        route: _Route = ctx.route
        return route.send_back(gradient).mul_(route.data.size()), None
