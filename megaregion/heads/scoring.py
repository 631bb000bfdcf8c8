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

from megaregion.config import HeadConfig
from megaregion.heads.class_gradient import ClassGradient
from megaregion.heads.scratch import Scratch
from megaregion.heads.streaming import DrawStream
from megaregion.heads.targets import Draw, Targets


class Scoring(NamedTuple):
    """What a micro-step's rows are scored with."""

    config: HeadConfig
    weight: Tensor
    """Centers of this rank, of any length, [K, E]."""
    gradient: ClassGradient
    targets: Targets
    group: dist.ProcessGroup
    """All ranks; together they hold all classes."""
    chunk_bytes: int
    scratch: Scratch
    learns: bool
    """Whether gradients are wanted."""


class RowSums(NamedTuple):
    """Sums over the head's rows, 0-d each."""

    loss: Tensor
    cosine: Tensor
    """Positives' cosines."""
    positives: Tensor
    won: Tensor
    """Rows in which a positive beats all drawn negatives."""


def score_rows(features: Tensor, scoring: Scoring) -> RowSums:
    """Score unit rows [R, E] against the targets' draws; the loss carries gradient."""
    return RowSums(*_ScoreRows.apply(features, scoring))


class _ScoreRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, scoring: Scoring) -> tuple[Tensor, ...]:
        targets = scoring.targets
        by_features = torch.zeros_like(features) if scoring.learns else None
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        cosines = torch.zeros_like(targets.labels, dtype=features.dtype)
        best = features.new_full((len(targets.index),), float("-inf"))
        for draw in targets.draws:
            total += _score_draw(draw, features, scoring, by_features, cosines, best)
        dist.all_reduce(best, op=dist.ReduceOp.MAX, group=scoring.group)
        if by_features is not None:
            scoring.gradient.expect_factor()
            ctx.save_for_backward(by_features)
        ctx.gradient = scoring.gradient
        valid = targets.labels >= 0
        won = (cosines.masked_fill(~valid, -2.0).amax(1) > best).sum() if len(best) else valid.sum()
        sums = total.to(features.dtype), cosines.sum(), valid.sum(), won
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (by_features,) = ctx.saved_tensors
        ctx.gradient.take_factor(by_total)
        return by_features * by_total, None


def _score_draw(
    draw: Draw,
    features: Tensor,
    scoring: Scoring,
    by_features: Tensor | None,
    cosines: Tensor,
    best: Tensor,
) -> Tensor:
    """Loss of one draw's rows, 0-d; fills their part of the other arguments."""
    targets, gradient = scoring.targets, scoring.gradient
    index = targets.index[draw.rows]
    centers = (
        scoring.weight
        if draw.classes is None
        else scoring.scratch.rows("centers", scoring.weight, draw.classes)
    )
    stream = DrawStream(
        scoring.config,
        features[index],
        centers,
        draw.columns,
        targets.labels[draw.rows] >= 0,
        scoring.group,
        scoring.chunk_bytes,
        scoring.scratch,
    )
    if by_features is None:
        sums = stream.run(None, None)
    else:
        by_rows = features.new_empty((len(index), features.shape[1]))
        room = gradient.room(draw.classes)
        sums = stream.run(by_rows, room)
        gradient.settle(draw.classes, room)
        by_features[index] = by_rows
    cosines[draw.rows], best[draw.rows] = sums.cosines, sums.best
    return sums.loss
