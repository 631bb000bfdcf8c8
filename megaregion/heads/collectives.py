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

from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.parallel.topology import NodeGroups, Topology


class GatheringRows:
    """Rows of all ranks, on their way; every rank has as many."""

    def __init__(self, rows: Tensor, group: dist.ProcessGroup, nodes: NodeGroups | None = None) -> None:
        """Send this rank's rows; :meth:`arrive` waits for all."""
        self._nodes = nodes
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
        if self._nodes is None:
            return rows
        inside, between = self._nodes.inside, self._nodes.between
        by_place = rows.new_empty((inside.size() * len(rows), *rows.shape[1:]))
        dist.all_gather_single(by_place, rows, group=inside)
        shape = (inside.size(), between.size(), each, *rows.shape[1:])
        return by_place.view(shape).transpose(0, 1).flatten(0, 2)


def scatter_sums(rows: Tensor, group: dist.ProcessGroup, nodes: NodeGroups | None = None) -> Tensor:
    """The way back of the gather: sum all ranks' parts of all rows [R, ...], give each its own, [r, ...].

    With ``nodes`` it goes node by node, and sums are added in another order.
    """
    each = len(rows) // group.size()
    if nodes is None:
        return _reduce_scatter(rows, each, group)
    inside, between = nodes.inside, nodes.between
    by_node = rows.view(between.size(), inside.size(), each, *rows.shape[1:])
    by_place = by_node.transpose(0, 1).flatten(0, 2)
    return _reduce_scatter(_reduce_scatter(by_place, between.size() * each, inside), each, between)


def _reduce_scatter(rows: Tensor, each: int, group: dist.ProcessGroup) -> Tensor:
    own = rows.new_empty((each, *rows.shape[1:]))
    dist.reduce_scatter_single(own, rows.contiguous(), group=group)
    return own


class GatheredFeatures:
    """Normalised features of a micro-step's rows over all data ranks; both heads share one gather.

    Until the rows are asked for there is time for other work.
    """

    def __init__(self, features: Tensor, topology: Topology) -> None:
        """Normalise this rank's region embeddings [r, E], with gradient, and send for those of all."""
        self._unit, self._topology = _UnitRows.apply(features), topology
        self._gathering = GatheringRows(self._unit.detach(), topology.data_group, topology.node_groups)
        self._rows: Tensor | None = None
        self.narrow = self._unit.is_cuda and self._unit.dtype == torch.bfloat16
        """Whether the rows are bf16 ones on a GPU."""

    @cached_property
    def sums(self) -> Tensor:
        """Sum of each row, not finite where the row is not, [R]."""
        return self.rows.detach().sum(1)

    @property
    def rows(self) -> Tensor:
        """Unit rows (zero where the feature is zero), with gradient, [R, E]; asked for, they are awaited."""
        if self._rows is None:
            self._rows = _GatherRows.apply(self._unit, self._gathering, self._topology)
        return self._rows


class _UnitRows(torch.autograd.Function):
    """L2 normalisation whose gradient at a row of zeros is zero, not the 1e12 of a clamped norm."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        scale = unit_scale(rows)
        ctx.save_for_backward(rows, scale)
        return torch.mul(rows, scale, out=torch.empty_like(rows))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rows, scale = ctx.saved_tensors
        unit = rows * scale
        along = (unit * gradient).sum(1, keepdim=True)
        across = torch.addcmul(gradient, along, unit, value=-1)
        return torch.mul(across, scale, out=torch.empty_like(rows))


class _GatherRows(torch.autograd.Function):
    """All-gather over the data group; backward sums over the world as the gradient contract says."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, gathering: GatheringRows, topology: Topology) -> Tensor:
        ctx.topology = topology
        return gathering.arrive()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        place: Topology = ctx.topology
        own = scatter_sums(gradient, place.data_group, place.node_groups)
        if place.tensor_size > 1:
            dist.all_reduce(own, group=place.tensor_group)
        return own.mul_(place.data_size), None, None


def unit_scale(rows: Tensor) -> Tensor:
    """The factor that gives each row [R, E] length 1, [R, 1]: 0 for a row of zeros, NaN if not finite.

    It is fp32 for rows of a narrower type.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
    tiny = torch.finfo(wide).tiny ** 0.5
    # norm - norm is 0, but NaN where the norm overflows: such a row must not pass as a row of zeros.
    return ((norm > tiny) + (norm - norm)) / norm.clamp_min(tiny)
