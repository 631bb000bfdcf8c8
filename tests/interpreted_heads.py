"""The grouped head in Triton's interpreter against fp64, and on ranks against the torch path; run by itself.

Triton decides at import whether to interpret: TRITON_INTERPRET=1 must be set.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from typing import Any

import test_heads_distributed as ranks
import torch
import torch.distributed as dist
import triton.language as tl
from head_reference import (
    build_head,
    dense_center_gradient,
    dense_loss,
    drawn_of,
    group_of_one,
    place_of,
    positives_of,
    targets_of,
)
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from megaregion.config import HeadConfig
from megaregion.heads import GatheredFeatures, kernels, sharded
from megaregion.heads.grouped import GroupedDraws

kernels.ROWS = kernels.LINES = 16
kernels.CLASSES = kernels.WIDTH = kernels.PORTION = 32
CLASSES, DIM, ROWS = 45, 37, 29
SMALL = 4 * ROWS * 20
"""Bytes that force several waves."""

SHARED = (
    "softmax, cosface, 1 labels, rate 1.0",
    "fewer classes than ranks",
    "scale beyond the bound",
    "near classes",
)


def compare(
    group: Any, labels: int, tolerance: float, operand: torch.dtype | None = None, **options: Any
) -> None:
    """Two micro-steps of ragged draws; loss and both gradients against the formulas in fp64."""
    chunk, draw_rows = options.pop("chunk_bytes", 10**6), options.pop("draw_rows", 17)
    config = HeadConfig(min_negatives=4, **options)
    head = build_head(config, CLASSES, DIM, place_of(group), chunk_bytes=chunk)
    head.open_draws, head.operand = GroupedDraws, operand
    generator = torch.Generator().manual_seed(labels)
    features = torch.randn((ROWS, DIM), generator=generator).requires_grad_()
    found = torch.randint(-1 if labels > 1 else 0, CLASSES, (ROWS, labels), generator=generator)
    found[:, 0].clamp_(min=0)
    rows = torch.rand(ROWS, generator=generator) < 0.8
    own, centers = (value.detach().double().requires_grad_() for value in (features, head.weight))
    for step in range(2):
        targets = targets_of(head, found, rows, step, 0, draw_rows)
        result = head.score(GatheredFeatures(features, head.topology), targets)
        (result.sum * 0.37).backward()
        drawn = drawn_of(targets, CLASSES)
        expected = dense_loss(own[rows], centers, positives_of(targets), drawn, config)
        (expected * 0.37).backward()
        close(result.sum.detach(), expected.detach(), tolerance)
    close(features.grad, own.grad, tolerance)
    close(dense_center_gradient(head), centers.grad, tolerance)


def close(found: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    assert found is not None
    assert expected is not None
    off = float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0))
    assert off <= tolerance, f"off by {off:.1e}"


def alone() -> None:
    """All losses, margins and label kinds; each with one of several draws, all classes, and several waves."""
    ways = itertools.cycle(
        ({"sample_rate": 0.3}, {"sample_rate": 1.0}, {"sample_rate": 0.3, "chunk_bytes": SMALL})
    )
    losses, margins = ("separated", "softmax"), ("cosface", "arcface", "none")
    with group_of_one() as group:
        for (loss, margin, labels), way in zip(
            itertools.product(losses, margins, (1, 4)), ways, strict=False
        ):
            compare(group, labels, 2e-5, loss=loss, margin_kind=margin, **way)
        for loss in losses:
            compare(group, 4, 2e-5, loss=loss, scale=200.0, sample_rate=1.0, chunk_bytes=SMALL)
            compare(group, 1, 2e-5, loss=loss, sample_rate=1e-9, draw_rows=0)


def narrow_and_at_the_edges() -> None:
    """Operands of bf16, which the interpreter's product takes for whole numbers, and :func:`edges`."""
    product, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        if left.dtype.scalar == tl.bfloat16:
            left, right = (cast(builder, operand, tl.float32) for operand in (left, right))
        return product(builder, left, right, *rest)

    InterpreterBuilder.create_dot = widened
    with group_of_one() as group:
        for loss, labels in (("separated", 4), ("softmax", 1)):
            compare(group, labels, 2e-2, torch.bfloat16, loss=loss, scale=16.0, sample_rate=0.5)
        edges(group)


def edges(group: Any) -> None:
    """No rows, no negatives, a row of zeros, and a loss that nobody differentiates."""
    for classes, rows, loss in ((1, 3, "softmax"), (1, 3, "separated"), (9, 0, "softmax")):
        head = build_head(HeadConfig(loss=loss), classes, DIM, place_of(group))
        head.open_draws = GroupedDraws
        features = torch.zeros((3, DIM), requires_grad=True)
        labels, chosen = torch.zeros((3, 1), dtype=torch.int64), torch.arange(3) < rows
        result = head.score(GatheredFeatures(features, head.topology), targets_of(head, labels, chosen, 0))
        result.sum.backward()
        assert torch.isfinite(result.sum)
        assert torch.equal(features.grad, torch.zeros(3, DIM))
        assert torch.isfinite(dense_center_gradient(head)).all()
        with torch.no_grad():
            plain = head.score(GatheredFeatures(features, head.topology), targets_of(head, labels, chosen, 0))
        assert torch.equal(plain.sum, result.sum.detach())


def on_rank(rank: int, folder: str) -> None:
    """Some cases of ranks, by the grouped path and by torch, must agree on every rank."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    world, ranks.STEPS = dist.group.WORLD, 1
    for name in SHARED:
        found = []
        for draws in (sharded.choose_draws, lambda *_: GroupedDraws):
            sharded.choose_draws = draws
            found.append(ranks.train(ranks.CASES[name], world, world, None, None))
        ranks.assert_agrees([found[1]], found[0], tensor=3)
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    if sys.argv[1] == "alone":
        alone()
    elif sys.argv[1] == "narrow":
        narrow_and_at_the_edges()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(on_rank, (folder,), nprocs=3, start_method="fork")
