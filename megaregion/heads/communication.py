"""Collectives of the head: rows are gathered over the data-parallel ranks, gradients go back to their owners.

Every rank scores all rows of the micro-step against its own classes. The rows are gathered over the
data-parallel group alone (tensor-parallel ranks already hold the same rows), in the order of data
ranks, which is the order of sample positions. They travel in their own type, bf16 when the body is bf16,
and while they travel the caller may draw classes and fetch centers.

On several nodes the network between them is the narrow part, so each row crosses into a node once: on
the way out it first goes to the rank with the same place on each other node and spreads inside from
there; on the way back the ranks of a node first add up what they hold, then the nodes exchange sums.

Gradient contract: what a rank computes for a row is the part that its classes give. The gather's backward
sums the parts over the world, gives each rank its own rows and multiplies by the number of data ranks,
since the training engine then averages over them. A reduce-scatter does so with half the traffic of an
all-reduce; with tensor parallelism it runs among the ranks of one tensor rank, and only the rank's own
rows, one data rank's share, are then summed inside the tensor-parallel group, which is one node's.

Shapes: r rows on this rank, R rows over all data ranks, E embedding width, N nodes, L ranks on a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.lengths import unit_scale
from megaregion.parallel.topology import NodeGroups


class RowsUnderWay:
    """Rows of all ranks, on their way."""

    def __init__(
        self,
        rows: Tensor,
        group: dist.ProcessGroup,
        counts: Sequence[int] | None = None,
        nodes: NodeGroups | None = None,
    ) -> None:
        """Send this rank's rows; see ``gather_rows``."""
        self._nodes = nodes
        self._counts = None if counts is None or len(set(counts)) == 1 else list(counts)
        if self._counts is not None:
            padded = rows.new_zeros((max(self._counts), *rows.shape[1:]))
            padded[: len(rows)] = rows
            rows = padded
        # Held here, since what is being sent must not be freed.
        self._sent = rows.contiguous()
        first = group if nodes is None else nodes.between
        self._received = rows.new_empty((len(rows) * first.size(), *rows.shape[1:]))
        self._work = dist.all_gather_single(self._received, self._sent, group=first, async_op=True)

    def arrive(self) -> Tensor:
        """Wait for the rows of all ranks, [R, ...]; a GPU's queue waits, not the host. Call it once."""
        if self._work is not None:
            self._work.wait()
        rows, each = self._received, len(self._sent)
        if self._nodes is not None:
            inside, between = self._nodes.inside, self._nodes.between
            by_place = rows.new_empty((inside.size() * len(rows), *rows.shape[1:]))
            dist.all_gather_single(by_place, rows, group=inside)
            shape = (inside.size(), between.size(), each, *rows.shape[1:])
            rows = by_place.view(shape).transpose(0, 1).flatten(0, 2)
        if self._counts is None:
            return rows
        spread = rows.view(len(self._counts), each, *rows.shape[1:])
        return torch.cat([part[:count] for part, count in zip(spread, self._counts, strict=True)])


def gather_rows(
    rows: Tensor,
    group: dist.ProcessGroup,
    counts: Sequence[int] | None = None,
    nodes: NodeGroups | None = None,
) -> Tensor:
    """Concatenate the rows of all ranks in rank order.

    Args:
        rows: This rank's rows, [r, ...]; all but r is the same on every rank.
        group: The ranks.
        counts: Rows of each rank; None when all have as many as this one.
        nodes: The group by nodes, to go node by node; the result is the same bit for bit.

    Returns:
        All rows, [R, ...], without gradient.
    """
    return RowsUnderWay(rows, group, counts, nodes).arrive()


def scatter_sums(
    rows: Tensor,
    group: dist.ProcessGroup,
    counts: Sequence[int] | None = None,
    nodes: NodeGroups | None = None,
) -> Tensor:
    """Sum what all ranks hold for each row and give every rank its own rows: the way back of the gather.

    Args:
        rows: Parts of all rows, [R, ...].
        group: The ranks.
        counts: Rows of each rank; None when all have as many.
        nodes: The group by nodes, to go node by node; sums are then added in another order.

    Returns:
        This rank's rows, [r, ...].
    """
    if counts is None or len(set(counts)) == 1:
        each = len(rows) // group.size()
        if nodes is None:
            return _reduce_scatter(rows, each, group)
        inside, between = nodes.inside, nodes.between
        by_node = rows.view(between.size(), inside.size(), each, *rows.shape[1:])
        by_place = by_node.transpose(0, 1).flatten(0, 2)
        return _reduce_scatter(_reduce_scatter(by_place, between.size() * each, inside), each, between)
    padded = rows.new_zeros((len(counts), max(counts), *rows.shape[1:]))
    for place, part, count in zip(padded, rows.split(list(counts)), counts, strict=True):
        place[:count] = part
    return scatter_sums(padded.flatten(0, 1), group, nodes=nodes)[: counts[group.rank()]]


def _reduce_scatter(rows: Tensor, each: int, group: dist.ProcessGroup) -> Tensor:
    own = rows.new_empty((each, *rows.shape[1:]))
    dist.reduce_scatter_single(own, rows.contiguous(), group=group)
    return own


class GatheredFeatures:
    """Normalised features of a micro-step's rows over all data ranks; both heads share one gather."""

    def __init__(self, unit: Tensor, route: _Route) -> None:
        """Send this rank's unit rows [r, E] along a route."""
        self._unit, self._route = unit, route
        self._under_way = RowsUnderWay(unit.detach(), route.data, route.counts, route.nodes)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Unit rows (zero where the feature is zero), with gradient, [R, E]; asked for, they are awaited."""
        if self._rows is None:
            self._rows = _GatherRows.apply(self._unit, self._under_way, self._route)
        return self._rows


def gather_features(
    features: Tensor,
    world_group: dist.ProcessGroup,
    data_group: dist.ProcessGroup,
    tensor_group: dist.ProcessGroup | None = None,
    row_counts: Sequence[int] | None = None,
    nodes: NodeGroups | None = None,
) -> GatheredFeatures:
    """Normalise this rank's features and send for those of all data ranks.

    Args:
        features: Region embeddings of this rank's rows, with gradient, [r, E].
        world_group: All ranks.
        data_group: This rank's data-parallel ranks.
        tensor_group: The ranks that hold the same rows; known, it lightens the way back.
        row_counts: Rows of each data rank; None when all bring as many.
        nodes: The data group by nodes, to go node by node.

    Returns:
        What will be there when its ``rows`` are asked for; until then there is time for other work.
    """
    route = _Route(world_group, data_group, tensor_group, row_counts, nodes)
    return GatheredFeatures(_UnitRows.apply(features), route)


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
    nodes: NodeGroups | None

    def send_back(self, parts: Tensor) -> Tensor:
        """Sum parts [R, E] over the world and keep this rank's rows, [r, E]."""
        if self.world.size() == self.data.size():
            return scatter_sums(parts, self.data, self.counts, self.nodes)
        if self.tensor is not None:
            own = scatter_sums(parts, self.data, self.counts, self.nodes)
            dist.all_reduce(own, group=self.tensor)
            return own
        total = parts.clone()
        dist.all_reduce(total, group=self.world)
        counts = self.counts or [len(total) // self.data.size()] * self.data.size()
        return total.split(list(counts))[self.data.rank()]


class _GatherRows(torch.autograd.Function):
    """All-gather over the data group; backward sums over the world as the gradient contract says."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, under_way: RowsUnderWay, route: _Route) -> Tensor:
        ctx.route = route
        return under_way.arrive()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        route: _Route = ctx.route
        return route.send_back(gradient).mul_(route.data.size()), None, None
