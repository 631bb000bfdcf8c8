"""Peak memory of every stage of curation when the input grows.

Ratios are peak for the small input / peak for the large one; flat within 10 percent is 0.91.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.memory import PeakMemory
from benchmark.report import Case, Report
from benchmark.scenes import scene_folder
from megaregion.command_line import whole
from megaregion.curation.pipeline import LIST, Share, curate, curate_share
from megaregion.curation.settings import (
    ClusterSettings,
    CurationSettings,
    ImageSettings,
    PackSettings,
    TokenizerSettings,
)
from megaregion.curation.stages import NAMES
from megaregion.errors import UserError

FLAT = 1 / 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--images", type=whole(8), default=40, help="images of the small input")
    parser.add_argument("--factor", type=whole(2), default=10, help="how many times larger the large one is")
    parser.add_argument("--clusters", type=whole(), default=32, help="object classes of both")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Run every stage in a process of its own, on both inputs.

    Raises:
        UserError: An input has too few regions for the clusters.
    """
    report = Report(describe_host(device))
    sizes = (options.images, options.images * options.factor)
    with scene_folder(sizes[1], 256) as scenes, tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        small, large = (
            _peaks(_copy(scenes / "images", Path(folder) / f"images-{count}", count), options.clusters)
            for count in sizes
        )
    for stage, peak in small.items():
        case = f"{stage}, {sizes[1]} images / {sizes[0]}"
        report.cases.append(Case(case, large[stage] / 2**20, peak / 2**20, FLAT, "MiB"))
    return report


def _copy(images: Path, target: Path, count: int) -> Path:
    """Copy the first images of a folder; returns the new folder."""
    target.mkdir()
    for path in sorted(images.iterdir())[:count]:
        shutil.copy2(path, target)
    return target


def _peaks(images: Path, clusters: int) -> dict[str, int]:
    """Peak resident memory of each stage, in bytes, by name."""
    settings = CurationSettings(
        image=ImageSettings(piece_images=8),
        cluster=ClusterSettings(clusters),
        tokenizer=TokenizerSettings(vocab=384),
        pack=PackSettings(samples_per_shard=32),
    )
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for stage in (LIST, *NAMES):
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(theirs, images, settings, stage))
        process.start()
        theirs.close()
        try:
            answer = ours.recv()
        except EOFError:
            answer = f"the process of stage {stage} died"
        process.join()
        if isinstance(answer, str):
            raise UserError(answer)
        peaks[stage] = answer
    return peaks


def _run(pipe: Connection, images: Path, settings: CurationSettings, stage: str) -> None:
    """One stage, as a job of a cluster does it; sends the peak, or what went wrong."""
    out = images.with_name(f"{images.name}-curated")
    try:
        if stage == LIST:
            curate(images, out, settings, _silent, stage, workers=0)
        else:
            curate_share(images, out, settings, _silent, stage, Share(0, 1), workers=0)
        pipe.send(PeakMemory(torch.device("cpu")).peak())
    except UserError as error:
        pipe.send(str(error))


@contextmanager
def _silent(stage: str, images: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
