"""The class-sharded head: a million centers spread over all ranks, with their own optimizer.

Rank r of the world holds a contiguous range of classes, ceil(K / W) each (the last ranks may hold fewer,
or none). It scores all rows of the micro-step against them; only row sums travel. The head stays outside
the training engine, which would broadcast one rank's shard over the others.

Shapes: r rows on this rank, R rows over all data ranks, K classes over all ranks, E embedding width,
T labels of a row (padded with -1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadBackend, HeadConfig, OptimizerConfig
from megaregion.errors import UserError
from megaregion.heads.centers import given_centers, random_centers
from megaregion.heads.class_gradient import ClassGradient
from megaregion.heads.communication import GatheredFeatures, gather_features, gather_rows
from megaregion.heads.lengths import unit_scale
from megaregion.heads.row_adamw import RowAdamW
from megaregion.heads.scoring import RowSums, score_rows
from megaregion.heads.scratch import Scratch
from megaregion.heads.streaming import StreamSettings
from megaregion.heads.targets import DrawRule, NonFiniteFeatures, Targets, build_targets


@dataclass(frozen=True)
class HeadLoss:
    """Loss of one head over all rows of a micro-step; the same on every rank."""

    sum: Tensor
    """Sum of the row losses, with gradient, 0-d."""
    count: Tensor
    """Rows of this head over all data ranks, 0-d int64."""
    metrics: dict[str, Tensor]
    """0-d: positive_cosine, accuracy (a positive beats all drawn negatives), sample_rate, positive_share."""


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
            seed: Seed of centers and draws.
            name: Name of the head (object or text); part of every random key.
            chunk_bytes: Memory for logits.
            backend: Kernel of the streaming loss.
            optimizer: Betas, eps and decay of the centers' AdamW.
            dtype: Type of centers and moments; float64 serves tests.

        Raises:
            UserError: No classes.
        """
        if classes < 1:
            raise UserError(f"head {name} needs at least 1 class, got {classes}")
        self.config, self.classes, self.dim, self.name, self.seed = config, classes, dim, name, seed
        self.world_group, self.data_group = world_group, data_group
        self.chunk_bytes, self.backend = chunk_bytes, backend
        share = -(-classes // world_group.size())
        start = min(world_group.rank() * share, classes)
        self.local = range(start, min(start + share, classes))
        self.weight = random_centers(seed, name, self.local, dim).to(dtype)
        self.optimizer = RowAdamW(self.weight, optimizer or OptimizerConfig())
        self.gradient, self.scratch = ClassGradient(self.weight), Scratch(self.weight)

    @property
    def device(self) -> torch.device:
        """Where the centers live."""
        return self.weight.device

    def to(self, device: torch.device | str) -> ClassShardedHead:
        """Move centers and moments to a device; gradients gathered so far are forgotten."""
        self.weight = self.weight.to(device)
        self.optimizer.to(self.weight)
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
        marked = gather_rows(marked, self.data_group, row_counts)
        return build_targets(
            marked[:, :-1],
            marked[:, -1] > 0,
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
            features = gather_features(features, self.world_group, self.data_group, row_counts=row_counts)
        return self.score(features, targets)

    def score(self, features: GatheredFeatures, targets: Targets) -> HeadLoss:
        """Loss of gathered features against prepared targets; see ``loss``."""
        rows = features.rows.to(self.weight.dtype)
        self._refuse_non_finite(rows.detach(), targets)
        settings = StreamSettings(self.config, self.world_group, self.chunk_bytes, self.scratch)
        sums = score_rows(rows, targets, self.weight, self.gradient, settings)
        count = torch.tensor(len(targets.index), device=self.device)
        return HeadLoss(sums.loss, count, self._metrics(sums, count, targets))

    def _refuse_non_finite(self, rows: Tensor, targets: Targets) -> None:
        bad = ~rows.sum(1).isfinite()[targets.index]
        if bool(bad.any()):
            raise NonFiniteFeatures(self.name, targets.index[bad].tolist())

    def _metrics(self, sums: RowSums, count: Tensor, targets: Targets) -> dict[str, Tensor]:
        sizes = [sum(draw.size for draw in targets.draws), sum(draw.positives for draw in targets.draws)]
        drawn = torch.tensor(sizes, dtype=torch.float32, device=self.device)
        dist.all_reduce(drawn, group=self.world_group)
        return {
            "positive_cosine": sums.cosine / sums.positives.clamp_min(1),
            "accuracy": sums.won / count.clamp_min(1),
            "sample_rate": drawn[0] / max(1, self.classes * len(targets.draws)),
            "positive_share": drawn[1] / drawn[0].clamp_min(1),
        }

    def grad_norm_squared(self) -> Tensor:
        """Squared norm of the centers' gradients over all ranks, 0-d."""
        total = self.gradient.finish().clone()
        dist.all_reduce(total, group=self.world_group)
        return total.to(self.weight.dtype)

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """Move the centers that took part, with gradients times ``scale`` (the clip coefficient)."""
        self.gradient.finish()
        self.optimizer.step(self.gradient.rows, self.gradient.values, lr, scale)

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        self.gradient.clear()

    def state(self) -> dict[str, LocalTensor]:
        """This rank's piece of everything a checkpoint needs: weight, exp_avg, exp_avg_sq, count."""
        pieces = {
            name: getattr(self.optimizer, name) for name in ("weight", "exp_avg", "exp_avg_sq", "count")
        }
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

    @torch.no_grad()
    def cosines(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Cosines between features and this rank's centers.

        Args:
            features: Region embeddings, [r, E].
            classes: Some classes of this rank's range by global number; None for all of them.

        Returns:
            Cosines, [r, number of classes].
        """
        rows = self.weight if classes is None else self.weight[classes.to(self.device) - self.local.start]
        unit = features.to(self.weight) * unit_scale(features.to(self.weight))
        return unit @ (rows * unit_scale(rows)).T
