"""A dense head written as the formulas stand, for comparison: every score, autograd, no tricks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadConfig
from megaregion.heads import ClassShardedHead, Targets


def dense_loss(
    features: Tensor,
    weight: Tensor,
    positives: Sequence[set[int]],
    drawn: Sequence[set[int]],
    config: HeadConfig,
) -> Tensor:
    """Sum of row losses; row i has positives[i], and of drawn[i] what is left is negative."""
    cosines = unit(features) @ unit(weight).T
    total = features.new_zeros(()) + 0 * cosines.sum()
    for row, (own, classes) in enumerate(zip(positives, drawn, strict=True)):
        s_p = with_margin(cosines[row, sorted(own)], config) * config.scale
        s_n = cosines[row, sorted(classes - own)] * config.scale
        if config.loss == "separated":
            zero = cosines.new_zeros(1)
            total = (
                total
                + torch.logsumexp(torch.cat([zero, -s_p]), 0)
                + torch.logsumexp(torch.cat([zero, s_n]), 0)
            )
        else:
            each = [torch.logsumexp(torch.cat([s[None], s_n]), 0) - s for s in s_p]
            total = total + torch.stack(each).mean()
    return total


def with_margin(cosine: Tensor, config: HeadConfig) -> Tensor:
    if config.margin_kind == "cosface":
        return cosine - config.margin
    if config.margin_kind == "arcface":
        angle = cosine.acos()
        past = angle + config.margin >= math.pi
        return torch.where(
            past, cosine - config.margin * math.sin(config.margin), (angle + config.margin).cos()
        )
    return cosine


def unit(rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths == 0, 1.0, lengths)


def positives_of(targets: Targets) -> list[set[int]]:
    return [{label for label in row if label >= 0} for row in targets.labels.tolist()]


def drawn_of(targets: Targets, classes: int) -> list[set[int]]:
    """Each row's draw, for a head whose only rank holds all classes."""
    drawn = []
    for draw in targets.draws:
        found = set(range(classes)) if draw.classes is None else set(draw.classes.tolist())
        drawn += [found] * (draw.rows.stop - draw.rows.start)
    return drawn


def dense_center_gradient(head: ClassShardedHead) -> Tensor:
    """The head's finished gradients as a full local matrix."""
    head.grad_norm_squared()
    full = torch.zeros_like(head.weight)
    if head.gradient.rows is None:
        return full + head.gradient.values
    full[head.gradient.rows] = head.gradient.values
    return full


@contextmanager
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """A gloo group with this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()
