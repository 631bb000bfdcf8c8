"""What guards, slow-rank report and logging take from a step.

The ratio is step / guards: 100 is 1 percent of a step. Under torchrun the guards' collectives cross all
ranks; rank 0 reports. Every call that the training loop makes for them is made here, by the same
functions in the same process group, in every step, though a run of weeks logs every tenth. The step is
the encoder's alone (forward, backward, AdamW; no head, no data, no communication), so the share that
comes out is an upper bound.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Case, Report
from megaregion.checkpoint.fence import Fence
from megaregion.command_line import whole
from megaregion.config import GuardConfig, ModelConfig
from megaregion.models.vit import RegionEncoder
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.training.clock import PHASES, Clock, gather_times
from megaregion.training.guard import LossGuard, agree
from megaregion.training.metrics import LOG, Metrics

GOAL = 100.0
"""Least ratio of a step's time to that of the guards: at most 1%."""
REGIONS = 10
LOGGED = ("loss", "loss_object", "loss_text", "lr", "grad_norm", "images_per_second", "head_share",
          "data_share", "bad", "skipped", "rollbacks", "object/rate", "text/rate")  # fmt: skip
"""As many numbers as a run logs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--images", type=whole(), default=8, help="images of a rank's step")
    parser.add_argument(
        "--width", type=whole(64, 65_536, multiple=64), default=768, help="width of the encoder"
    )
    parser.add_argument("--depth", type=whole(4, 1000), default=12, help="blocks of the encoder")
    parser.add_argument(
        "--image-size", type=whole(16, 16_384, multiple=16), default=224, help="side of the images, in pixels"
    )
    parser.add_argument("--repeats", type=whole(), default=5, help="timed steps; the fastest counts")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Time guards and steps."""
    model = ModelConfig(
        image_size=options.image_size, width=options.width, depth=options.depth,
        heads=options.width // 64, mlp_width=4 * options.width,
    )  # fmt: skip
    place = topology.join(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report(describe_host(device))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        ours = _guards_seconds(Path(folder), place, 200 * options.repeats)
    step = _encoder_step(model, options.images, place.device)
    step()
    seconds = Stopwatch(place.device).fastest(step, options.repeats)
    size = f"{model.width} x {model.depth}, {options.images} images, {place.world_size} ranks"
    report.cases.append(
        Case(f"guards and logging of a step, against the step of {size}", ours, seconds, GOAL, "s")
    )
    topology.leave()
    return report


def _guards_seconds(folder: Path, place: Topology, calls: int) -> float:
    """Mean seconds that the guards of one step take; metrics go to the folder."""
    guards = _guards_of_a_step(folder, place)
    LOG.setLevel(logging.WARNING)  # The line is made and handed to the log; a terminal is not measured.
    guards(1)
    began = time.perf_counter()
    for number in range(2, calls + 2):
        guards(number)
    return (time.perf_counter() - began) / calls


def _guards_of_a_step(folder: Path, place: Topology) -> Callable[[int], None]:
    """What the training loop calls in each step beside training."""
    clock, guard = Clock(place.device), LossGuard(GuardConfig())
    metrics = Metrics(folder, place.rank == 0, total_steps=1)
    fence = Fence(folder, 0, "benchmark")
    loss = torch.ones((), device=place.device)
    values: dict[str, float | int | None] = dict.fromkeys(LOGGED, 1.0)
    for _ in range(GuardConfig().window):
        guard.judge(agree(False, loss, loss, place.world_group))

    def guards(step: int) -> None:
        clock.begin_step(step)
        for phase in PHASES:
            with clock.span(phase):
                pass
        guard.judge(agree(False, loss, loss, place.world_group))
        clock.end_step(bad=0)
        gather_times(clock.take(), place).slow_ranks(1.5)
        fence.lost()
        metrics.write(step, values, {"slow": []})

    return guards


def _encoder_step(model: ModelConfig, images: int, device: torch.device) -> Callable[[], None]:
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
