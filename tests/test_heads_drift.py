"""A long toy run on one rank and on four: rounding must not grow into a difference.

Set MEGAREGION_DRIFT_STEPS=10000 for the full length; the default keeps the test suite short.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from head_reference import build_head, loss_of, place_of
from launch import launch

from megaregion.config import HeadConfig

STEPS = int(os.environ.get("MEGAREGION_DRIFT_STEPS", "300"))
ROWS, INPUT, DIM, CLASSES = 8, 6, 5, 22


def on_rank(folder: str) -> None:
    """Train on all four ranks, then the first rank alone."""
    dist.init_process_group("gloo")
    alone = dist.new_group([0])
    losses = {"four": train(dist.group.WORLD)}
    if dist.get_rank() == 0:
        losses["one"] = train(alone)
    torch.save(losses, Path(folder) / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train(group: Any) -> list[float]:
    """Learn to tell noisy class patterns apart through one linear map; the loss of every step."""
    head = build_head(HeadConfig(scale=16.0, sample_rate=0.3, min_negatives=3), CLASSES, DIM, place_of(group))
    patterns = torch.randn((CLASSES, INPUT), generator=torch.Generator().manual_seed(2))
    body = torch.randn((INPUT, DIM), generator=torch.Generator().manual_seed(3)).requires_grad_()
    own = slice(ROWS // group.size() * group.rank(), ROWS // group.size() * (group.rank() + 1))
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        labels = torch.randint(0, CLASSES, (ROWS, 1), generator=generator)
        seen = patterns[labels[:, 0]] + 0.3 * torch.randn((ROWS, INPUT), generator=generator)
        result = loss_of(
            head, seen[own] @ body, labels[own], torch.ones(len(seen[own]), dtype=torch.bool), step
        )
        (result.sum / ROWS).backward()
        assert body.grad is not None
        dist.all_reduce(body.grad, group=group)
        with torch.no_grad():
            body -= 0.01 * body.grad / group.size()
        body.grad = None
        head.step(2e-3)
        head.zero_grad()
        losses.append(float(result.sum.detach()))
    return losses


def test_losses_of_one_and_of_four_ranks_do_not_drift_apart(tmp_path: Path) -> None:
    launch(on_rank, 4, str(tmp_path), timeout=3000)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    one, four = torch.tensor(found[0]["one"]), torch.tensor(found[0]["four"])
    assert len(one) == STEPS
    assert all(rank["four"] == found[0]["four"] for rank in found)
    assert float(one[-100:].mean()) < 0.75 * float(one[:100].mean()), "the toy problem is not being learned"
    early, late = (float(((one - four).abs() / one)[part].max()) for part in (slice(100), slice(-100, None)))
    print(f"relative difference of the losses: {early:.1e} in the first, {late:.1e} in the last 100 steps")
    torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-3)
