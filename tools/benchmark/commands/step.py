"""``benchmark.py step``: our training step beside MLCDVisionModel under AdamW and beside bare products."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch

from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Report
from megaregion.checks import check_model
from megaregion.config import ModelConfig
from megaregion.errors import UserError

if TYPE_CHECKING:
    from benchmark.step import StepSizes

HELP = "our training step against MLCDVisionModel + AdamW and the matrix rate"
DESCRIPTION = (
    "Ratios are peer / ours. Heads are excluded; every contestant has a process of its own, and they take "
    "turns. Goals belong to the default size."
)
GOALS = {"peer": 1.08, "rate": 0.82, "memory": 1 / 0.9, "regions": 1 / 1.06, "packed": 1.25, "padding": 0.97}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--width", type=int, default=768, help="width D of a token")
    add("--depth", type=int, default=12, help="blocks")
    add("--heads", type=int, default=12, help="attention heads")
    add("--patch", type=int, default=16, help="side of a patch, in pixels")
    add("--size", type=int, default=224, help="side of an image, in pixels")
    add("--batch", type=int, default=8, help="images of a step")
    add("--bf16", action="store_true", help="bf16 instead of float32")
    add("--compile", action="store_true", help="run torch.compile beside them; it compiles for minutes")
    add(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts only each process's own time, for a shared machine; use it with --threads 1",
    )
    add("--rounds", type=int, default=5, help="timed steps of each; the fastest counts")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Measure one size."""
    from benchmark.compare_steps import compare_steps
    from benchmark.step import StepSizes

    sizes = step_sizes(options)
    goals = GOALS if sizes == StepSizes() else {}
    watch = Stopwatch(device, processor=options.clock == "processor")
    cases = compare_steps(sizes, goals, watch, options.rounds, options.compile)
    return Report({**describe_host(device), "clock": options.clock}, cases)


def step_sizes(options: argparse.Namespace) -> StepSizes:
    """The size that the flags describe.

    Raises:
        UserError: The sizes do not fit each other.
    """
    from benchmark.step import StepSizes

    if min(options.batch, options.rounds) < 1:
        raise UserError("--batch and --rounds must be at least 1")
    model = ModelConfig(
        image_size=options.size,
        patch_size=options.patch,
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        mlp_width=4 * options.width,
        region_layers=min(4, options.depth),
    )
    check_model(model, tensor=1)
    return StepSizes(model, options.batch, options.bf16)
