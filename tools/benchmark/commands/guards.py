"""``benchmark.py guards``: what guards and logging take from a step."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Report
from megaregion.config import ModelConfig
from megaregion.errors import UserError

HELP = "what guards, slow-rank report and logging take from a step"
DESCRIPTION = (
    "The ratio is step / guards: 100 is 1 percent of a step. Under torchrun the guards' collectives cross "
    "all ranks; rank 0 reports."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--images", type=int, default=8, help="images of a rank's step")
    parser.add_argument("--width", type=int, default=768, help="width of the encoder")
    parser.add_argument("--depth", type=int, default=12, help="blocks of the encoder")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the fastest counts")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Time guards and steps.

    Raises:
        UserError: A flag is out of range.
    """
    from benchmark.guards import compare_guards
    from megaregion.parallel import topology

    if options.images < 1 or options.repeats < 1 or options.depth < 4 or options.width % 64:
        raise UserError("--images and --repeats must be at least 1, --depth 4, --width a multiple of 64")
    if options.image_size < 16 or options.image_size % 16:
        raise UserError(f"--image-size must be a multiple of 16, got {options.image_size}")
    model = ModelConfig(
        image_size=options.image_size, width=options.width, depth=options.depth,
        heads=options.width // 64, mlp_width=4 * options.width,
    )  # fmt: skip
    place = topology.join(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report(describe_host(device))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        report.cases += compare_guards(
            model, options.images, Path(folder), place, Stopwatch(place.device), options.repeats
        )
    topology.leave()
    return report
