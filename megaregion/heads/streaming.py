"""The streaming loss: row losses and gradients without ever holding the matrix of logits.

Forward passes over chunks of classes and keeps, per row, the positives' cosines and the sum of
exponentials over negatives. Backward computes each chunk's logits again and turns them into gradients
of features and centers.

Shapes: R rows, E embedding width, C classes of a draw on this rank, T positives of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadConfig
from megaregion.heads.communication import unit_scale
from megaregion.heads.losses import RowTerms, row_terms
from megaregion.heads.margin import apply_margin
from megaregion.heads.targets import Draw, Targets

Deposit = Callable[[Tensor | None, slice, Tensor], None]


@dataclass(frozen=True)
class StreamingTask:
    """What the streaming loss needs besides features."""

    config: HeadConfig
    weight: Tensor
    """Centers of this rank, not normalised, [local classes, E]."""
    targets: Targets
    group: dist.ProcessGroup
    """All ranks; together they hold all classes."""
    chunk_bytes: int
    deposit: Deposit
    """Takes the centers' gradients: (classes of the draw or None, slice of them, [chunk, E])."""


class StreamingLoss(torch.autograd.Function):
    """Sum of the row losses of one micro-step over all ranks' classes."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, task: StreamingTask) -> tuple[Tensor, Tensor]:
        """Sum of losses (0-d) and metrics sums, [3]: positive cosine, positives, rows won."""
        total = features.new_zeros(())
        sums = features.new_zeros(3)
        terms = []
        for draw in task.targets.draws:
            rows = features[task.targets.index[draw.rows]]
            cosines, mass, best, shift = _sweep(rows, draw, task)
            valid = task.targets.labels[draw.rows] >= 0
            scores, slope = apply_margin(cosines, task.config.margin_kind, task.config.margin)
            found = row_terms(task.config.loss, scores * task.config.scale, valid, mass, shift)
            total += found.loss.sum()
            winner = cosines.masked_fill(~valid, -2).amax(1) > best
            sums += torch.stack([(cosines * valid).sum(), valid.sum(), winner.sum()])
            terms.append((found._replace(by_positive=found.by_positive * slope), shift))
        ctx.save_for_backward(features)
        ctx.task, ctx.terms = task, terms
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Gradient of the gathered rows from this rank's classes; the centers' is deposited."""
        (features,) = ctx.saved_tensors
        task: StreamingTask = ctx.task
        by_features = torch.zeros_like(features)
        for draw, (terms, shift) in zip(task.targets.draws, ctx.terms, strict=True):
            index = task.targets.index[draw.rows]
            by_features[index] = _gradients(features[index], draw, task, terms, shift, by_total)
        return by_features, None


def _chunks(draw: Draw, rows: int, task: StreamingTask) -> Iterator[slice]:
    """Slices of a draw's classes whose logits fit the memory budget."""
    width = max(1, task.chunk_bytes // max(1, rows * task.weight.element_size()))
    for start in range(0, draw.size, width):
        yield slice(start, min(start + width, draw.size))


def _unit_centers(draw: Draw, chunk: slice, task: StreamingTask) -> tuple[Tensor, Tensor]:
    """Normalised centers of a chunk, [C, E], and the factors that made them so, [C, 1]."""
    rows = task.weight[chunk] if draw.classes is None else task.weight[draw.classes[chunk]]
    scale = unit_scale(rows)
    return rows * scale, scale


def _own(draw: Draw, chunk: slice) -> tuple[Tensor, Tensor]:
    """Positives inside a chunk: column of each (0 where it is elsewhere) and whether it is there."""
    inside = (draw.columns >= chunk.start) & (draw.columns < chunk.stop)
    return (draw.columns - chunk.start).masked_fill(~inside, 0), inside


def _sweep(rows: Tensor, draw: Draw, task: StreamingTask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positives' cosines [R, T], sums over negatives [R], best negatives' cosines [R], and shift [R]."""
    scale = task.config.scale
    cosines = torch.zeros(draw.columns.shape, dtype=rows.dtype, device=rows.device)
    mass = rows.new_zeros(len(rows))
    best = rows.new_full((len(rows),), -2.0)
    shift = rows.new_zeros(len(rows))
    for chunk in _chunks(draw, len(rows), task):
        tile = rows @ _unit_centers(draw, chunk, task)[0].T
        column, inside = _own(draw, chunk)
        cosines += tile.gather(1, column) * inside
        tile.scatter_add_(1, column, torch.where(inside, -4.0, 0.0).to(tile.dtype))
        best = torch.maximum(best, tile.amax(1))
        raised = torch.maximum(shift, best * scale)
        part = tile.mul_(scale).sub_(raised[:, None]).exp_()
        part.scatter_add_(1, column, torch.where(inside, -part.gather(1, column), 0.0))
        mass = mass * (shift - raised).exp() + part.sum(1)
        shift = raised
    top = torch.stack([best, shift])
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=task.group)
    mass = mass * (shift - top[1]).exp()
    parts = torch.cat([cosines, mass[:, None]], 1)
    dist.all_reduce(parts, group=task.group)
    return parts[:, :-1], parts[:, -1], top[0], top[1]


def _gradients(
    rows: Tensor, draw: Draw, task: StreamingTask, terms: RowTerms, shift: Tensor, by_total: Tensor
) -> Tensor:
    """Deposit the centers' gradients; return this rank's part of the rows' gradient, [R, E]."""
    scale = task.config.scale
    by_rows = torch.zeros_like(rows)
    for chunk in _chunks(draw, len(rows), task):
        unit, factor = _unit_centers(draw, chunk, task)
        tile = (rows @ unit.T).mul_(scale).sub_(shift[:, None]).clamp_(max=88.0).exp_()
        tile.mul_(terms.by_negative[:, None])
        column, inside = _own(draw, chunk)
        tile.scatter_add_(1, column, torch.where(inside, -tile.gather(1, column), 0.0))
        tile.scatter_add_(1, column, torch.where(inside, terms.by_positive, 0.0))
        tile.mul_(by_total * scale)
        by_rows += tile @ unit
        by_unit = tile.T @ rows
        by_unit -= (by_unit * unit).sum(1, keepdim=True) * unit
        task.deposit(draw.classes, chunk, by_unit * factor)
    return by_rows
