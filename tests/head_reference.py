"""A dense head written as the formulas stand, for comparison: every score, autograd, no tricks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadConfig, HeadsConfig, OptimizerConfig, RunConfig
from megaregion.heads import ClassShardedHead, GatheredFeatures, HeadLoss, Targets
from megaregion.heads.sampling import GatheringLabels
from megaregion.parallel.topology import NodeGroups, Topology


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


def place_of(world: Any, data: Any = None, tensor: Any = None, nodes: NodeGroups | None = None) -> Topology:
    """A rank's place from its groups; without others the world's ranks are all data-parallel."""
    data = data or world
    size = world.size() // data.size()
    return Topology(
        rank=world.rank(), world_size=world.size(), tensor_rank=world.rank() % size, tensor_size=size,
        device=torch.device("cpu"), world_group=world, data_group=data, tensor_group=tensor or data,
        node_groups=nodes,
    )  # fmt: skip


def build_head(
    config: HeadConfig,
    classes: int,
    dim: int,
    place: Topology,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig | None = None,
    chunk_bytes: int = 256 * 2**20,
) -> ClassShardedHead:
    """A head of objects."""
    heads = HeadsConfig(embedding_dim=dim, chunk_bytes=chunk_bytes, object=config)
    run = RunConfig(seed=seed, head=heads, optimizer=optimizer or OptimizerConfig())
    return ClassShardedHead("object", run, classes, place, dtype)


def targets_of(
    head: ClassShardedHead, labels: Tensor, rows: Tensor, step: int, first_row: int = 0, draw_rows: int = 0
) -> Targets:
    """Targets from the labels of this rank's rows, gathered as a run gathers them."""
    place = head.topology
    found, mine = (GatheringLabels(own, place, None).arrive() for own in (labels, rows[:, None].long()))
    return head.draw(found, mine[:, 0] > 0, step, first_row, draw_rows)


def loss_of(
    head: ClassShardedHead,
    features: Tensor,
    labels: Tensor,
    rows: Tensor,
    step: int,
    first_row: int = 0,
    draw_rows: int = 0,
) -> HeadLoss:
    """Loss of this rank's rows together with those of all other ranks."""
    targets = targets_of(head, labels, rows, step, first_row, draw_rows)
    return head.score(GatheredFeatures(features, head.topology), targets)


def drawn_of(targets: Targets, classes: int) -> list[set[int]]:
    """Each row's draw, for a head whose only rank holds all classes."""
    drawn = []
    for draw in targets.draws:
        found = (
            set(range(classes))
            if targets.classes_of(draw) is None
            else set(targets.classes_of(draw).tolist())
        )
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
