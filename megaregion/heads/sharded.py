"""The class-sharded head: a million centers spread over all ranks, with their own optimizer.

Rank r of the world holds a contiguous range of classes, ceil(K / W) each (the last ranks may hold fewer,
or none). It scores all rows of the micro-step against them; only row sums travel. The head stays outside
the training engine, which would broadcast one rank's shard over the others.

Shapes: r rows on this rank, R rows over all data ranks, K classes over all ranks, E embedding width,
T labels of a row (padded with -1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadBackend, HeadConfig, OptimizerConfig
from megaregion.errors import UserError
from megaregion.heads.census import Census, take_census
from megaregion.heads.centers import given_centers, random_centers
from megaregion.heads.class_gradient import ClassGradient
from megaregion.heads.communication import GatheredFeatures, gather_features, gather_rows
from megaregion.heads.exponentials import choose_kernel
from megaregion.heads.finite import FiniteGuard
from megaregion.heads.head_loss import HeadLoss, SamplingWatch, report_loss
from megaregion.heads.products import Products
from megaregion.heads.ranking import nearest_classes
from megaregion.heads.row_adamw import RowAdamW
from megaregion.heads.scoring import fetch_centers, score_rows
from megaregion.heads.scratch import Scratch
from megaregion.heads.streaming import StreamSettings
from megaregion.heads.targets import DrawRule, Targets, build_targets
from megaregion.parallel.topology import NodeGroups


class LocalTensor(NamedTuple):
    """A rank's piece of a tensor that is spread over the ranks along its first dimension."""

    full_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor


class ClassShardedHead:
    """Centers of one label kind, their loss and their optimizer."""

    def __init__(
        self,
        config: HeadConfig,
        classes: int,
        dim: int,
        *,
        world_group: dist.ProcessGroup,
        data_group: dist.ProcessGroup,
        tensor_group: dist.ProcessGroup | None = None,
        node_groups: NodeGroups | None = None,
        seed: int,
        name: str,
        chunk_bytes: int = 256 * 2**20,
        backend: HeadBackend = "auto",
        optimizer: OptimizerConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Lay out the class range and its first centers.

        Args:
            config: Loss, margin, scale and sampling.
            classes: Number K of classes over all ranks.
            dim: Embedding width E.
            world_group: All ranks; together they hold all classes.
            data_group: The data-parallel ranks of this rank, in data-rank order.
            tensor_group: The ranks that hold the same rows; known, it lightens the gradients' way back.
            node_groups: The data group by nodes, for rows that shall enter each node once.
            seed: Seed of centers and draws.
            name: Name of the head (object or text); part of every random key.
            chunk_bytes: Memory for logits.
            backend: Kernel between the matrix products: torch, triton, or auto, which is torch.
            optimizer: Betas, eps, decay and type of moments of the centers' AdamW.
            dtype: Type of the centers; float64 serves tests.

        Raises:
            UserError: No classes, or a backend that is not there.
        """
        if classes < 1:
            raise UserError(f"head {name} needs at least 1 class, got {classes}")
        self.config, self.classes, self.dim, self.name, self.seed = config, classes, dim, name, seed
        self.world_group, self.data_group = world_group, data_group
        self.tensor_group, self.node_groups = tensor_group, node_groups
        self.chunk_bytes, self.kernel = chunk_bytes, choose_kernel(backend)
        share = -(-classes // world_group.size())
        start = min(world_group.rank() * share, classes)
        self.local = range(start, min(start + share, classes))
        self.operand: torch.dtype | None = None
        """Type of the operands of matrix products; None chooses bf16 for bf16 features on a GPU."""
        self.weight = random_centers(seed, name, self.local, dim).to(dtype)
        self.optimizer = RowAdamW(self.weight, optimizer or OptimizerConfig())
        self.last_positive = torch.full((len(self.local),), -1, dtype=torch.int32)
        self.guard, self.sampling = FiniteGuard(name), SamplingWatch(name, config.sample_rate)
        self.gradient, self.scratch = ClassGradient(self.weight), Scratch(self.weight)

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

    def start_from(self, centers: np.ndarray | Tensor) -> None:
        """Replace the random first centers by given ones; see ``given_centers``.

        Args:
            centers: Centers of all classes, [K, C]; a memory map is read only where needed.

        Raises:
            UserError: Centers of another number of classes.
        """
        if len(centers) != self.classes:
            raise UserError(
                f"head {self.name} has {self.classes} classes but was given {len(centers)} centers; "
                "take centers.npy of the dataset that is trained on"
            )
        self.weight.copy_(given_centers(centers, self.seed, self.name, self.local, self.dim))

    def prepare(
        self,
        labels: Tensor,
        rows: Tensor,
        step: int,
        first_row: int = 0,
        draw_rows: int = 0,
        row_counts: Sequence[int] | None = None,
    ) -> Targets:
        """Gather and check the labels of a micro-step and draw its negatives.

        Args:
            labels: Labels of this rank's rows, -1 padded, int64 [r, T]; T is the same on all ranks.
            rows: Which rows belong to this head, bool [r].
            step: Optimizer step; part of the draw's key.
            first_row: Place of the micro-step's first row in the step's global order.
            draw_rows: Consecutive global rows that share one draw; 0 for all of the micro-step.
            row_counts: Rows of each data rank; None when all bring as many.

        Raises:
            UserError: Labels of a wrong type or shape or outside the label space, or a row without any.
        """
        if labels.dtype != torch.int64 or labels.ndim != 2:
            raise UserError(
                f"labels of head {self.name} must be int64 [rows, tokens], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        marked = torch.cat([labels, rows[:, None].to(labels)], 1).to(self.device)
        marked = gather_rows(marked, self.data_group, row_counts, self.node_groups)
        return self.draw(marked[:, :-1], marked[:, -1] > 0, step, first_row, draw_rows)

    def draw(
        self, labels: Tensor, rows: Tensor, step: int, first_row: int = 0, draw_rows: int = 0
    ) -> Targets:
        """As ``prepare``, from labels [R, T] and rows [R] that were gathered already.

        The draw is made where they are: on the host it asks nothing of a GPU, however much is queued there.
        """
        targets = build_targets(
            labels,
            rows,
            DrawRule(
                name=self.name,
                classes=self.classes,
                local=self.local,
                ranks=self.world_group.size(),
                seed=self.seed,
                rate=self.config.sample_rate,
                min_negatives=self.config.min_negatives,
            ),
            step=step,
            first_row=first_row,
            draw_rows=draw_rows,
        )
        self.sampling.look(targets, len(self.local))
        return targets.to(self.device)

    def loss(
        self,
        features: Tensor | GatheredFeatures,
        labels: Tensor,
        rows: Tensor,
        step: int,
        first_row: int = 0,
        draw_rows: int = 0,
        row_counts: Sequence[int] | None = None,
    ) -> HeadLoss:
        """Loss of this rank's rows together with those of all other ranks.

        Args:
            features: Region embeddings [r, E] with gradient, or what ``gather_features`` made of them.
            labels: As for ``prepare``.
            rows: As for ``prepare``.
            step: As for ``prepare``.
            first_row: As for ``prepare``.
            draw_rows: As for ``prepare``.
            row_counts: As for ``prepare``.

        Raises:
            NonFiniteFeatures: A row of this head holds NaN or infinity; nothing was changed.
            UserError: As for ``prepare``.
        """
        targets = self.prepare(labels, rows, step, first_row, draw_rows, row_counts)
        if isinstance(features, Tensor):
            features = gather_features(
                features, self.world_group, self.data_group, self.tensor_group, row_counts, self.node_groups
            )
        return self.score(features, targets)

    def score(self, features: GatheredFeatures, targets: Targets) -> HeadLoss:
        """Loss of gathered features against prepared targets; see ``loss``."""
        # The rows may still be under way: what does not need them comes first.
        ahead = fetch_centers(targets.draws[0], self.weight, self.scratch) if targets.draws else None
        narrow = features.rows.is_cuda and features.rows.dtype == torch.bfloat16
        operand = self.operand or (torch.bfloat16 if narrow else self.weight.dtype)
        rows = features.rows.to(self.weight.dtype)
        self.guard.watch(rows.detach(), targets.index)
        settings = StreamSettings(
            config=self.config,
            group=self.world_group,
            chunk_bytes=self.chunk_bytes,
            scratch=self.scratch,
            products=Products(operand),
            kernel=self.kernel,
        )
        sums = score_rows(rows, targets, self.weight, self.gradient, settings, ahead)
        if torch.is_grad_enabled():
            for draw in targets.draws:
                self.last_positive.index_fill_(0, draw.positives, targets.step)
        return report_loss(sums, targets, self.classes, self.world_group)

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
        """Move the centers that took part.

        Args:
            lr: Learning rate.
            scale: Factor of the gradients (the clip coefficient).

        Raises:
            NonFiniteFeatures: On a GPU, if features of the step were not finite; nothing was changed.
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
        """Take over a checkpoint that any number of ranks wrote.

        Args:
            reader: Gives the piece of a tensor of ``state`` at an offset, of a shape.
        """
        found = {name: reader(name, p.offset, tuple(p.tensor.shape)) for name, p in self.state().items()}
        for name, piece in self.state().items():
            piece.tensor.copy_(found[name])
        self.zero_grad()

    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k classes nearest to each feature, over all ranks.

        Args:
            features: Region embeddings, the same on every rank, [r, E].
            k: Classes wanted.

        Returns:
            Falling cosines and their classes, both [r, k].
        """
        wanted = min(k, self.classes)
        return nearest_classes(features.to(self.device), self.weight, self.local, self.world_group, wanted)

    def census(self, step: int, patience: int, probes: int = 1024, threshold: float = 0.95) -> Census:
        """Classes idle for ``patience`` steps, and centers that have become alike; see census.py."""
        group = self.world_group
        return take_census(
            self.weight,
            self.last_positive,
            self.local,
            self.classes,
            group,
            step,
            patience,
            probes,
            threshold,
        )
