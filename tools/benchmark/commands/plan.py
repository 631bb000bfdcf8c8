"""``benchmark.py plan``: what the planner says of this machine beside real training steps on it."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "the planner's memory and step time against real training on this machine"
DESCRIPTION = (
    "Ours is the plan, made from rates that the same run measures first; peer is what the training took. "
    "Ratios are measured / planned, and must not miss the goal either way."
)
CASES = ("1", "2", "2-tensor", "2-recompute", "2-zero3")
"""Names of the cases: ranks, and what is special."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--case", choices=[*CASES, "all"], nargs="+", default=["1", "2"], help="ranks and what is special")
    add("--model", choices=["s16", "b16"], default="b16", help="ViT that is trained, at 224 pixels")
    add("--batch", type=int, default=4, help="images of a micro-step and rank")
    add(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts only a rank's own time on one thread, for a machine that others use, too",
    )
    add("--steps", type=int, default=4, help="timed training steps, the first left out")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Plan and train each case.

    Raises:
        UserError: A flag is out of range.
    """
    from benchmark.plan import MODELS, compare_plan, training_run

    if options.batch < 1 or options.steps < 2:
        raise UserError("--batch must be at least 1 and --steps at least 2")
    if device.type != "cpu":
        raise UserError("benchmark.py plan measures processors only so far; use --device cpu")
    cores = 1 if options.clock == "processor" else options.threads or os.cpu_count() or 1
    report = Report(describe_host(device))
    for name in CASES if "all" in options.case else options.case:
        ranks, tensor = int(name[0]), 2 if name.endswith("tensor") else 1
        stage = 3 if name.endswith("zero3") else 1
        recompute, model = name.endswith("recompute"), MODELS[options.model]
        config = training_run(model, ranks, tensor, stage, recompute, options.batch, options.steps)
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            report.cases += compare_plan(config, ranks, max(1, cores // ranks), options.clock, Path(folder))
    return report
