"""``benchmark.py checkpoint``: what an asynchronous save takes from training."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "what an asynchronous save takes from training, against a synchronous one"
DESCRIPTION = "Ratios are synchronous save / ours; a ratio of 20 is 5 percent of its time."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument(
        "--parameters",
        type=lambda text: int(float(text)),
        default=300_000_000,
        help="parameters of the model; the state is 12 bytes for each, and memory and disk hold it twice",
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=2, help="saves of each kind; the fastest counts")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Save a state of that size both ways.

    Raises:
        UserError: A flag is out of range, or the disk has too little room.
    """
    from benchmark.checkpoint import compare_saves
    from megaregion.parallel import topology

    if options.parameters < 1024 or options.repeats < 1:
        raise UserError("--parameters must be at least 1024 and --repeats at least 1")
    needed, free = 24 * options.parameters, shutil.disk_usage(options.folder).free
    if free < needed:
        raise UserError(f"--folder {options.folder} needs {needed / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    place = topology.join(1)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report({**describe_host(device), "folder": str(options.folder)})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as folder:
        report.cases += compare_saves(options.parameters, Path(folder), place, device, options.repeats)
    topology.leave()
    return report
