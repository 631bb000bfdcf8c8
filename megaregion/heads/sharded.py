"""The class-sharded head: a million centers spread over all ranks, with their own optimizer.

Rank r of W holds a contiguous range of classes, ceil(K / W) each (the last ranks may hold fewer, or none). It
scores all rows of the micro-step against them; only row sums travel. The head stays outside the training
engine, which would broadcast one rank's shard over the others.

The rows are gathered over the data-parallel group alone (tensor-parallel ranks already hold the same rows),
in the order of data ranks, which is the order of sample positions. They travel in their own type, bf16 when
the body is bf16, and while they travel the caller may draw classes and fetch centers.

Gradient contract: what a rank computes for a row is the part that its classes give. The gather's backward
sums the parts over the world, gives each rank its own rows and multiplies by the number of data ranks,
since the training engine then averages over them. A reduce-scatter does so with half the traffic of an
all-reduce; with tensor parallelism it runs among the ranks of one tensor rank, and only the rank's own
rows, one data rank's share, are then summed inside the tensor-parallel group, which is one node's.

Shapes: r rows on this rank, R rows over all data ranks, K classes over all ranks, E embedding width, T labels
of a row (padded with -1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.heads.centers import (
    MOST_NEAR,
    ClassGradient,
    DeadClasses,
    RowAdamW,
    find_doubles,
    find_near,
    given_centers,
    random_centers,
)
from megaregion.heads.grouped import choose_draws
from megaregion.heads.sampling import DrawRule, SamplingWatch, Targets, build_targets
from megaregion.heads.streaming import HeadWork, score_rows
from megaregion.heads.tiles import Scratch
from megaregion.parallel.topology import GatheringRows, Topology, scatter_sums

LOG = logging.getLogger(__name__)


class LocalTensor(NamedTuple):
    """A rank's piece of a tensor that is spread over the ranks along its first dimension."""

    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class HeadLoss:
    """Loss of one head over all rows of a micro-step; the same on every rank."""

    sum: Tensor
    """Sum of the row losses, with gradient, 0-d."""
    count: Tensor
    """Rows of this head over all data ranks, 0-d int64."""
    metrics: dict[str, Tensor]
    """0-d: positive_cosine (mean), accuracy (share of rows in which a positive beats all drawn negatives),
    sample_rate (share of classes drawn, positives included), positive_share (share of drawn classes that
    are positives of some row)."""


class ClassShardedHead:
    """Centers of one label kind, their loss and their optimizer."""

    def __init__(
        self,
        kind: str,
        config: RunConfig,
        classes: int,
        topology: Topology,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Lay out this rank's class range and its first centers.

        The kind, object or text, is part of every random key. The classes are spread over the topology's
        world group. Centers of float64 serve tests.

        Raises:
            UserError: No classes, or a backend that is not there.
        """
        if classes < 1:
            raise UserError(f"head {kind} needs at least 1 class, got {classes}")
        self.config, self.classes, self.name = config.head.by_kind[kind], classes, kind
        self.dim, self.chunk_bytes = config.head.embedding_dim, config.head.chunk_bytes
        self.topology, self.world_group = topology, topology.world_group
        ranks, rank = self.world_group.size(), self.world_group.rank()
        share = -(-classes // ranks)
        start = min(rank * share, classes)
        self.local = range(start, min(start + share, classes))
        rate, floor = self.config.sample_rate, self.config.min_negatives
        self.rule = DrawRule(kind, classes, self.local, ranks, config.seed, rate, floor)
        self.operand: torch.dtype | None = None
        """Type of the operands of matrix products; None chooses bf16 for bf16 features on a GPU."""
        self.weight = random_centers(config.seed, kind, self.local, self.dim).to(dtype)
        self.optimizer = RowAdamW(self.weight, config.optimizer)
        self.last_positive = torch.full((len(self.local),), -1, dtype=torch.int32)
        self.guard, self.sampling = FiniteGuard(kind), SamplingWatch(kind, rate)
        self.gradient, self.scratch = ClassGradient(self.weight), Scratch(self.weight)
        self.open_draws = choose_draws(kind, config, topology)

    @property
    def device(self) -> torch.device:
        """Where the centers live."""
        return self.weight.device

    def to(self, device: torch.device | str) -> ClassShardedHead:
        """Move centers and moments to a device; gradients gathered so far are forgotten."""
        self.weight = self.weight.to(device)
        self.optimizer.to(self.weight)
        self.last_positive = self.last_positive.to(device)
        self.gradient, self.scratch = ClassGradient(self.weight), Scratch(self.weight)
        return self

    def start_from(self, *centers: np.ndarray | Tensor) -> None:
        """Replace the random first centers by ``given_centers`` of all classes, [K, C], in one part or more.

        Raises:
            UserError: Centers of another number of classes.
        """
        self._check_number(centers)
        first = 0
        for part in centers:
            own = range(max(self.local.start, first), min(self.local.stop, first + len(part)))
            if own:
                place = slice(own.start - self.local.start, own.stop - self.local.start)
                wanted = range(own.start - first, own.stop - first)
                self.weight[place] = given_centers(part, self.rule.seed, self.name, wanted, self.dim)
            first += len(part)

    def spare_near(self, *centers: np.ndarray | Tensor) -> None:
        """Let classes near a row's positives be no negatives of it, by all classes' centers; a collective.

        Raises:
            UserError: Centers of another number of classes, or so many near ones that they would not fit.
        """
        self._check_number(centers)
        cosine = self.config.near_classes
        near = find_near(centers, self.local, cosine, self.device)
        counts = near.starts.diff().to(self.device)
        dist.all_reduce(counts, group=self.world_group)
        if (most := int(counts.max())) > MOST_NEAR:
            raise UserError(
                f"head.{self.name}.near_classes {cosine} makes more than {MOST_NEAR} classes near one "
                f"({most} or more near class {int(counts.argmax())}); raise it"
            )
        if self.topology.rank == 0:
            LOG.info(
                "head %s: a class has %.2f others nearer than %g, at most %d; they are no negatives of it",
                self.name, float(counts.double().mean()), cosine, most,
            )  # fmt: skip
        self.rule = replace(self.rule, near=near)

    def _check_number(self, centers: Sequence[np.ndarray | Tensor]) -> None:
        if (given := sum(map(len, centers))) != self.classes:
            raise UserError(
                f"head {self.name} has {self.classes} classes but was given {given} centers; "
                "take centers.npy of the dataset that is trained on"
            )

    def draw(
        self, labels: Tensor, rows: Tensor, step: int, first_row: int = 0, draw_rows: int = 0
    ) -> Targets:
        """Check the labels of a micro-step and draw its negatives, on the device where the labels are.

        On the host this asks nothing of a GPU, however much is queued there.

        Args:
            labels: Labels of the rows of all data ranks, -1 padded, int64 [R, T].
            rows: Which rows belong to this head, bool [R].
            step: Optimizer step; part of the draw's key.
            first_row: Place of the micro-step's first row in the step's global order.
            draw_rows: Consecutive global rows that share one draw; 0 for all of the micro-step.

        Raises:
            UserError: Labels of a wrong type or shape or outside the label space, or a row without any.
        """
        if labels.dtype != torch.int64 or labels.ndim != 2:
            raise UserError(
                f"labels of head {self.name} must be int64 [rows, tokens], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        targets = build_targets(labels, rows, self.rule, step, first_row, draw_rows)
        self.sampling.look(targets, len(self.local))
        return targets.to(self.device)

    def score(self, features: GatheredFeatures, targets: Targets) -> HeadLoss:
        """Loss of the rows of all data ranks against their draws.

        Raises:
            NonFiniteFeatures: On a processor, if a row of this head holds NaN or infinity.
        """
        operand = self.operand or (torch.bfloat16 if features.narrow else self.weight.dtype)
        group = self.world_group if self.world_group.size() > 1 else None
        work = HeadWork(self.config, group, self.chunk_bytes, operand, self.scratch, targets, self.weight)
        # The rows may still be under way: what does not need them comes first.
        draws = self.open_draws(work)
        self.guard.watch(features.sums, targets.index)
        loss, found = score_rows(features.rows, self.gradient, draws.score)
        if torch.is_grad_enabled():
            self.last_positive.index_fill_(0, targets.positives, targets.step)
        return self._report(loss, found, targets)

    def _report(self, loss: Tensor, found: Tensor, targets: Targets) -> HeadLoss:
        """Sums over the head's rows, the same on every rank, beside what this rank drew for them."""
        drawn, positives = targets.shares.clone()[:2], targets.shares[2:]
        dist.all_reduce(drawn, group=self.world_group)
        cosine, accuracy = found * positives
        metrics = {
            "positive_cosine": cosine,
            "accuracy": accuracy,
            "sample_rate": drawn[0],
            "positive_share": drawn[1] / drawn[0],
        }
        return HeadLoss(loss, targets.count, metrics)

    def grad_norm_squared(self) -> Tensor:
        """Squared norm of the centers' gradients over all ranks, 0-d.

        Raises:
            NonFiniteFeatures: On a GPU, if features of the step were not finite; nothing was changed.
        """
        self.guard.ask()
        total = self.gradient.finish().clone()
        dist.all_reduce(total, group=self.world_group)
        return total.to(self.weight.dtype)

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """Move the centers that took part, by gradients times ``scale`` (the clip coefficient).

        Raises:
            NonFiniteFeatures: As :meth:`grad_norm_squared`.
        """
        self.guard.ask()
        self.gradient.finish()
        self.optimizer.step(self.gradient.rows, self.gradient.values, lr, scale)

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        self.gradient.clear()
        self.guard.forget()

    def state(self) -> dict[str, LocalTensor]:
        """This rank's piece of what a checkpoint needs: weight, exp_avg, exp_avg_sq, count, last_positive."""
        names = ("weight", "exp_avg", "exp_avg_sq", "count")
        pieces = {name: getattr(self.optimizer, name) for name in names}
        pieces["last_positive"] = self.last_positive
        return {
            name: LocalTensor(
                (self.classes, *piece.shape[1:]), (self.local.start,) + (0,) * (piece.ndim - 1), piece
            )
            for name, piece in pieces.items()
        }

    def load(self, reader: Callable[[str, Sequence[int], Sequence[int]], Tensor]) -> None:
        """Take over any ranks' checkpoint; ``reader`` gives a tensor's piece by name, offset and shape."""
        found = {name: reader(name, p.offset, tuple(p.tensor.shape)) for name, p in self.state().items()}
        for name, piece in self.state().items():
            piece.tensor.copy_(found[name])
        self.zero_grad()

    def find_dead_classes(
        self, step: int, idle_steps: int, probes: int = 1024, threshold: float = 0.95
    ) -> DeadClasses:
        """Classes that were nobody's positive for ``idle_steps`` steps, and centers that have a double."""
        idle = (self.last_positive < step - idle_steps).sum()
        dist.all_reduce(idle, group=self.world_group)
        probed, doubles = find_doubles(
            self.weight, self.local, self.classes, self.world_group, step, probes, threshold
        )
        return DeadClasses(int(idle), probed, doubles)


class NonFiniteFeatures(UserError):
    """Features hold NaN or infinity; ``rows`` are the rows' numbers in the micro-step's global order."""

    def __init__(self, head: str, rows: Sequence[int]) -> None:
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        super().__init__(
            f"{len(rows)} features of head {head} are not finite (rows {shown} of the micro-step); "
            "the step is refused and the centers stay as they are"
        )
        self.rows = list(rows)


class FiniteGuard:
    """Refuses features that are not finite, as soon as it costs nothing to wait for the answer.

    On a processor that is at once; on a GPU, whose queue would stall, when the step ends, before anything is
    moved. A caller who judges the whole step himself, on all ranks at once, sets ``waits``: then nothing is
    raised here and :meth:`spoilt` says afterwards what was found.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self.waits = False
        self._unasked: list[tuple[Tensor, Tensor]] = []

    def watch(self, sums: Tensor, index: Tensor) -> None:
        """Note the rows ``index`` [n] of a micro-step, whose features add up to ``sum_dtype`` [R]."""
        self._unasked.append((index, sums))
        if sums.device.type == "cpu":
            self.ask()

    def ask(self) -> None:
        """Raise NonFiniteFeatures if any row noted since the last time was not finite."""
        if self.waits:
            return
        noted, self._unasked = self._unasked, []
        for index, sums in noted:
            bad = ~sums[index].isfinite()
            if bool(bad.any()):
                raise NonFiniteFeatures(self._head, index[bad].tolist())

    def spoilt(self) -> list[list[int]]:
        """Rows that were not finite, for each :meth:`watch` since they were last forgotten."""
        return [index[~sums[index].isfinite()].tolist() for index, sums in self._unasked]

    def forget(self) -> None:
        """Drop what was noted."""
        self._unasked = []


class GatheredFeatures:
    """Normalised features of a micro-step's rows over all data ranks; both heads share one gather.

    Until the rows are asked for there is time for other work.
    """

    def __init__(self, features: Tensor, topology: Topology, sum_dtype: torch.dtype | None = None) -> None:
        """Normalise this rank's region embeddings [r, E], with gradient, and send for those of all.

        Their gradients add up over the ranks as ``sum_dtype``, their own type if None.
        """
        self._unit, self._topology, self._sum_dtype = _UnitRows.apply(features), topology, sum_dtype
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
            self._rows = _GatherRows.apply(self._unit, self._gathering, self._topology, self._sum_dtype)
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
    def forward(
        ctx: Any, unit: Tensor, gathering: GatheringRows, topology: Topology, sum_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.topology, ctx.sum_dtype = topology, sum_dtype
        return gathering.arrive()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        place: Topology = ctx.topology
        own = scatter_sums(gradient, place.data_group, place.node_groups, ctx.sum_dtype)
        if place.tensor_size > 1:
            dist.all_reduce(own, group=place.tensor_group)
        scaled = torch.mul(own, place.data_size, out=torch.empty_like(own, dtype=gradient.dtype))
        return scaled, None, None, None


def unit_scale(rows: Tensor) -> Tensor:
    """The factor that gives each row [R, E] length 1, [R, 1]: 0 for a row of zeros, NaN if not finite.

    It is fp32 for rows of a narrower type.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide)
    tiny = torch.finfo(wide).tiny ** 0.5
    # norm - norm is 0, but NaN where the norm overflows: such a row must not pass as a row of zeros.
    return ((norm > tiny) + (norm - norm)) / norm.clamp_min(tiny)
