"""``benchmark.py atlas``: a synthetic atlas of many clusters beside one of few, built and looked at."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "an atlas of a million clusters against one of ten thousand: build, folder, Chromium's time and memory"
DESCRIPTION = "Ratios are small / large: 1 is a cost that does not grow with the clusters."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--clusters", type=int, default=1_000_000, help="clusters of the large atlas")
    parser.add_argument("--peer-clusters", type=int, default=10_000, help="clusters of the small one")
    parser.add_argument("--sheets", type=int, default=1000, help="clusters of each whose members are cropped")
    parser.add_argument("--folder", type=Path, default=Path(), help="where both are built")
    parser.add_argument("--keep", action="store_true", help="leave both there, to look at")
    parser.add_argument("--workers", type=int, default=2, help="processes that crop")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Build both and look at them.

    Raises:
        UserError: A flag is out of range, or Chromium is not installed.
    """
    from benchmark.atlas import compare_atlases, measure_atlas
    from benchmark.browser import require_programs

    if min(options.clusters, options.peer_clusters) < 1:
        raise UserError("--clusters and --peer-clusters must be 1 or more")
    require_programs()
    report = Report({**describe_host(device), "folder": str(options.folder)})
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as passing:
        folder = options.folder if options.keep else Path(passing)
        small, large = (
            measure_atlas(clusters, options.sheets, folder, options.workers)
            for clusters in (options.peer_clusters, options.clusters)
        )
    report.cases += compare_atlases(large, small)
    return report
