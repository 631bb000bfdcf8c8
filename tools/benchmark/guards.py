"""Guards, slow-rank report and logging beside the step that they watch."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmark.measure import Stopwatch, Work
from benchmark.part import Case, part
from megaregion.bounds import PositiveInt, Whole
from megaregion.checkpoint.fence import Fence
from megaregion.config import GuardConfig, ModelConfig
from megaregion.models.vit import RegionEncoder
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.training.clock import PHASES, Clock, gather_times
from megaregion.training.faults import LossGuard, agree
from megaregion.training.metrics import LOG, Metrics

GOAL = 100.0
"""Least ratio of a step's time to that of the guards: at most 1%."""
REGIONS = 10
LOGGED = ("loss", "loss_object", "loss_text", "lr", "grad_norm", "images_per_second", "head_share",
          "data_share", "bad", "skipped", "rollbacks", "object/rate", "text/rate")  # fmt: skip
"""As many numbers as a run logs."""


@part(
    ("--images", PositiveInt, 8, "images of a rank's step"),
    ("--width", Whole(64, 65_536, multiple=64), 768, "width of the encoder"),
    ("--depth", Whole(4, 1000), 12, "blocks of the encoder"),
    ("--image-size", Whole(16, 16_384, multiple=16), 224, "side of the images, in pixels"),
    ("--repeats", PositiveInt, 5, "timed steps; the fastest counts"),
)
def guards(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """What guards, slow-rank report and logging take from a step.

    The ratio is step / guards: 100 is 1 percent of a step. Under torchrun the guards' collectives cross all
    ranks; rank 0 reports. Every call that the training loop makes for them is made here, by the same
    functions in the same process group, in every step, though a run of weeks logs every tenth. The step is
    the encoder's alone (forward, backward, AdamW; no head, no data, no communication), so the share that
    comes out is an upper bound.
    """
    model = ModelConfig(
        image_size=options.image_size, width=options.width, depth=options.depth,
        heads=options.width // 64, mlp_width=4 * options.width,
    )  # fmt: skip
    place = topology.join(1)
    watch = Stopwatch(place.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        watching = _guards_of_a_step(Path(folder), place)
        LOG.setLevel(logging.WARNING)  # The line is made and handed to the log; a terminal is not measured.
        watching(1)
        steps = range(2, 200 * options.repeats + 2)
        ours = watch.seconds(lambda: [watching(step) for step in steps]) / len(steps)
    step = watch.fastest({"": _encoder_step(model, options.images, place.device)}, options.repeats)
    size = f"{model.width} x {model.depth}, {options.images} images, {place.world_size} ranks"
    yield Case(f"guards and logging of a step, against the step of {size}", ours, step[""], "s", GOAL)
    topology.leave()


def _guards_of_a_step(folder: Path, place: Topology) -> Callable[[int], None]:
    """What the training loop calls in each step beside training; metrics go to the folder."""
    clock, guard = Clock(place.device), LossGuard(GuardConfig())
    metrics = Metrics(folder, place.rank == 0, total_steps=1)
    fence = Fence(folder, 0, "benchmark")
    loss = torch.ones((), device=place.device)
    values: dict[str, float | int | None] = dict.fromkeys(LOGGED, 1.0)
    for _ in range(GuardConfig().window):
        guard.judge(agree(False, loss, loss, place.world_group))

    def watching(step: int) -> None:
        clock.begin_step(step)
        for phase in PHASES:
            with clock.span(phase):
                pass
        guard.judge(agree(False, loss, loss, place.world_group))
        clock.end_step(bad=0)
        gather_times(clock.take(), place).slow_ranks(1.5)
        fence.lost()
        metrics.write(step, values, {"slow": []})

    return watching


def _encoder_step(model: ModelConfig, images: int, device: torch.device) -> Work:
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
