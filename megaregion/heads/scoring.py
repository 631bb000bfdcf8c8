"""The head's place in the autograd graph: gathered rows go in, the sum of their losses comes out.

The gradient is computed with the loss (see streaming.py). What backward adds is the factor that the rest
of the graph puts on the sum: at once to the rows' gradient, at the end of the step to the centers'.

Shapes: R rows over all data ranks, E embedding width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.heads.class_gradient import ClassGradient
from megaregion.heads.lengths import make_unit
from megaregion.heads.scratch import Scratch
from megaregion.heads.streaming import DrawStream, RowResults, StreamSettings
from megaregion.heads.targets import Draw, Targets


class RowSums(NamedTuple):
    """Sums over the head's rows, 0-d each."""

    loss: Tensor
    cosine: Tensor
    """Positives' cosines."""
    positives: Tensor
    won: Tensor
    """Rows in which a positive beats all drawn negatives."""


def fetch_centers(draw: Draw, weight: Tensor, scratch: Scratch) -> Tensor:
    """Centers of a draw's classes, [C, E]; the same memory holds the next draw's.

    Chosen centers are copied, and as copies made unit ones: that is one pass over them instead of two over
    the scores. Where all classes are drawn there is no copy, and they keep their lengths.

    Args:
        draw: The draw.
        weight: Centers of this rank, [local classes, E].
        scratch: Memory for chosen centers.
    """
    return weight if draw.classes is None else make_unit(scratch.rows("centers", weight, draw.classes))


def score_rows(
    features: Tensor,
    targets: Targets,
    weight: Tensor,
    gradient: ClassGradient,
    settings: StreamSettings,
    ahead: Tensor | None = None,
) -> RowSums:
    """Score unit rows against the targets' draws.

    Args:
        features: Unit rows of the micro-step, [R, E].
        targets: Which of them the head scores, against what.
        weight: Centers of this rank, of any length, [local classes, E].
        gradient: Receives the centers' gradients if ``features`` wants one.
        settings: What all draws share.
        ahead: Centers of the first draw, if they were fetched already.

    Returns:
        The sums; the loss carries gradient.
    """
    learns = torch.is_grad_enabled() and features.requires_grad
    wanted = gradient if learns else None
    return RowSums(*_ScoreRows.apply(features, targets, weight, wanted, settings, ahead))


class _ScoreRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        targets: Targets,
        weight: Tensor,
        gradient: ClassGradient | None,
        settings: StreamSettings,
        ahead: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rows = len(targets.index)
        results = RowResults(
            loss=torch.zeros((), dtype=torch.float64, device=features.device),
            cosines=torch.zeros_like(targets.labels, dtype=features.dtype),
            best=features.new_full((rows,), float("-inf")),
            by_features=None if gradient is None else torch.zeros_like(features),
        )
        for draw in targets.draws:
            chosen = draw.classes
            centers = fetch_centers(draw, weight, settings.scratch) if ahead is None else ahead
            ahead = None
            room = None if gradient is None else gradient.room(chosen)
            DrawStream(settings, draw, features, centers, results).run(room)
            if gradient is not None and room is not None:
                gradient.settle(chosen, room)
        if gradient is not None:
            gradient.expect_factor()
            ctx.gradient, ctx.by_features = gradient, results.by_features
        sums = (results.loss.to(features.dtype), *_count(results, targets, settings.group))
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since this is its only use: a second backward is refused by take_factor's count.
        ctx.gradient.take_factor(by_total)
        return ctx.by_features.mul_(by_total), None, None, None, None, None


def _count(results: RowResults, targets: Targets, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of positives' cosines, number of positives, rows won."""
    dist.all_reduce(results.best, op=dist.ReduceOp.MAX, group=group)
    valid = targets.labels >= 0
    own = torch.where(valid, results.cosines, -2.0)
    won = (own.amax(1) > results.best).sum() if own.numel() else valid.sum()
    return results.cosines.sum(), valid.sum(), won
