"""``benchmark.py loader``: the loader beside plain webdataset and beside decoding alone."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "the loader against plain webdataset with Pillow, and against decoding and resizing alone"
DESCRIPTION = (
    "Photos of 640 x 480 pixels to crops of 224, each with twelve regions; all sides take the same crops of "
    "the same images in as many processes. Ratios are peer / ours."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--images", type=int, default=4096, help="images of the dataset that is composed, 90 KB each")
    add("--workers", type=int, default=2, help="processes that decode, of each side")
    add("--batch", type=int, default=64, help="images of a batch")
    add("--folder", type=Path, default=Path(), help="folder on the disk to read from; emptied afterwards")
    add("--repeats", type=int, default=3, help="passes over the images of each side; the fastest counts")
    add(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts the time of all processors over --workers, for a shared machine",
    )


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Compose the photos and read them all ways.

    Raises:
        UserError: A flag is out of range.
    """
    from benchmark.loader import Clock, compare_loaders, compare_resume
    from benchmark.photos import write_photos

    if options.workers < 1 or options.repeats < 1 or options.batch < 1:
        raise UserError("--workers, --repeats and --batch must be at least 1")
    if options.images < options.workers * options.batch:
        raise UserError(
            f"--images must be at least --workers times --batch, {options.workers * options.batch}, got "
            f"{options.images}"
        )
    setting = {"workers": options.workers, "clock": options.clock, "folder": str(options.folder)}
    report = Report({**describe_host(device), **setting})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as name:
        folder = Path(name)
        write_photos(folder, options.images)
        clock = Clock(options.workers, options.clock == "processor")
        report.cases += compare_loaders(folder, options.workers, options.batch, options.repeats, clock)
        report.cases += compare_resume(folder, options.workers, options.batch)
    return report
