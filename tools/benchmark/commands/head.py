"""``benchmark.py head``: the class-sharded head beside a PartialFC-style head and a dense softmax."""

from __future__ import annotations

import argparse

import torch

from benchmark.head import HeadSizes, compare
from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Report

HELP = "the class-sharded head against a PartialFC-style head and a dense softmax"
DESCRIPTION = "Ratios are peer / ours: more is better, for times and memory alike."
MIB = 2**20

STANDARD = {
    "million": (
        HeadSizes(1_000_000, 256, 1024, 0.1, 112 * MIB),
        {"step": 3.0, "memory": 8.0, "gemm": 1 / 1.35},
    ),
    "full": (
        HeadSizes(100_000, 512, 2048, 1.0, 16 * MIB),
        {"passes": 1.7, "memory": 10.0, "gemm": 1 / 1.35, "dense": 1.15, "dense_memory": 10.0},
    ),
}
"""The sizes with promised ratios, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--case", choices=[*STANDARD, "all"], default="all", help="standard sizes with goals")
    add("--classes", type=int, help="classes K; given, it replaces the standard sizes")
    add("--dim", type=int, default=256, help="embedding width")
    add("--rows", type=int, default=1024, help="region features of a step")
    add("--sample-rate", type=float, default=0.1, help="share of classes drawn")
    add("--chunk-mib", type=int, default=64, help="memory for scores, in MiB")
    add("--loss", choices=["softmax", "separated"], default="softmax", help="our loss")
    add("--dense", action="store_true", help="run the dense softmax also where rows are sampled")
    add("--repeats", type=int, default=3, help="timed steps; the fastest counts")
    add(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts only this process's time, for a shared machine; use it with --threads 1",
    )


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Run the sizes that were asked for."""
    watch = Stopwatch(device, processor=options.clock == "processor")
    report = Report({**describe_host(device), "clock": options.clock})
    for sizes, goals in _chosen(options):
        dense = options.dense or sizes.sample_rate == 1.0
        report.cases += compare(sizes, goals, options.repeats, watch, dense)
    return report


def _chosen(options: argparse.Namespace) -> list[tuple[HeadSizes, dict[str, float]]]:
    if options.classes is None:
        names = list(STANDARD) if options.case == "all" else [options.case]
        return [STANDARD[name] for name in names]
    chunk = options.chunk_mib * MIB
    sizes = HeadSizes(options.classes, options.dim, options.rows, options.sample_rate, chunk, options.loss)
    return [(sizes, {})]
