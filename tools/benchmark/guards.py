"""What guards and logging take from a step: their own calls, timed beside a step of the real model.

Every call that the training loop makes for them is made here by the same functions in the same process
group: notes of progress for the watchdog, the ranks' agreement and the guard's judgement with a full window,
the look for a newer start, own times gathered from all ranks and compared, and one line in the log, in
metrics.jsonl and in TensorBoard. All of it in every step, though a run of weeks logs every tenth.

The step is the encoder's alone (forward, backward, AdamW; no head, no data, no communication), so the share
that comes out is an upper bound.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmark.measure import Stopwatch
from benchmark.report import Case
from megaregion.checkpoint.fence import Fence
from megaregion.config import GuardConfig, ModelConfig
from megaregion.models.vit import RegionEncoder
from megaregion.parallel.topology import Topology
from megaregion.training.guard import LossGuard, agree
from megaregion.training.metrics import LOG, Metrics
from megaregion.training.progress import PHASES, Progress
from megaregion.training.slow import OwnTime, RankTimes, gather_times, slow_ranks

GOAL = 100.0
"""Least ratio of a step's time to that of the guards: at most 1%."""

REGIONS = 10
LOGGED = ("loss", "loss_object", "loss_text", "lr", "grad_norm", "images_per_second", "head_share",
          "data_share", "bad", "skipped", "rollbacks", "object/rate", "text/rate")  # fmt: skip
"""As many numbers as a run logs."""


def compare_guards(
    model: ModelConfig, images: int, folder: Path, topology: Topology, watch: Stopwatch, repeats: int
) -> list[Case]:
    """Measure both.

    Args:
        model: The encoder whose step is measured.
        images: Images of a rank's step.
        folder: Where metrics go.
        topology: All ranks.
        watch: The clock, on the device to run on.
        repeats: Timed steps; the fastest counts. The guards are called two hundred times as often, and
            their mean counts.
    """
    guards = guards_of_a_step(folder, topology)
    LOG.setLevel(logging.WARNING)  # The line is made and handed to the log; a terminal is not measured.
    guards(1)
    calls = 200 * repeats
    began = time.perf_counter()
    for number in range(2, calls + 2):
        guards(number)
    ours = (time.perf_counter() - began) / calls
    step = encoder_step(model, images, watch.device)
    step()
    seconds = min(watch.seconds(step) for _ in range(repeats))
    size = f"{model.width} x {model.depth}, {images} images, {topology.world_size} ranks"
    return [Case(f"guards and logging of a step, against the step of {size}", ours, seconds, GOAL, "s")]


def guards_of_a_step(folder: Path, topology: Topology) -> Callable[[int], None]:
    """What the training loop calls in each step beside training."""
    progress, guard = Progress(), LossGuard(GuardConfig())
    metrics = Metrics(folder, topology.rank == 0, total_steps=1)
    own_time, fence = OwnTime(topology.device, waits_inside=False), Fence(folder, 0, "benchmark")
    loss = torch.ones((), device=topology.device)
    values: dict[str, float | int | None] = dict.fromkeys(LOGGED, 1.0)
    window = GuardConfig().window
    for _ in range(window):
        guard.judge(agree(False, loss, loss, topology.world_group))

    def guards(step: int) -> None:
        for phase in PHASES[1:7]:
            progress.note(phase, step)
        with own_time.forward():
            pass
        guard.judge(agree(False, loss, loss, topology.world_group))
        since = RankTimes().plus(own_time.take(), 0.0, 0, 1.0)
        slow_ranks(gather_times(since, topology), 1.5)
        fence.lost()
        metrics.write(step, values, {"slow": []})

    return guards


def encoder_step(model: ModelConfig, images: int, device: torch.device) -> Callable[[], None]:
    """Forward, backward and update of the encoder alone."""
    encoder = RegionEncoder(model, embedding_dim=512).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    pixels = torch.randn(images, 3, model.image_size, model.image_size, device=device)
    visible = torch.ones(images, REGIONS, model.grid**2, dtype=torch.bool, device=device)

    def step() -> None:
        encoder(pixels, visible).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
