"""``benchmark.py convert``: time and memory of turning a checkpoint into a HuggingFace folder and back."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "time and memory of converting a large checkpoint, in a process of its own"
DESCRIPTION = "Peers are the limits (60 s and 3 GB for an L/14): a ratio of 2 is half of what is allowed."

DISK = 20e9
"""Bytes of disk that the largest shape needs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--shape", choices=["B/16", "L/14", "H/14"], default="L/14", help="which encoder")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that wrote the checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder on the disk to measure")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Write a checkpoint of that shape and convert it.

    Raises:
        UserError: A flag is out of range, or the disk has too little room.
    """
    from benchmark.convert import SHAPES, measure_conversion

    if options.ranks < 1:
        raise UserError(f"--ranks must be at least 1, got {options.ranks}")
    free = shutil.disk_usage(options.folder).free
    if free < DISK:
        raise UserError(f"--folder {options.folder} needs {DISK / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    report = Report({**describe_host(device), "folder": str(options.folder)})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as folder:
        threads = options.threads or torch.get_num_threads()
        config = SHAPES[options.shape]
        report.cases += measure_conversion(Path(folder), options.shape, config, options.ranks, threads)
    return report
