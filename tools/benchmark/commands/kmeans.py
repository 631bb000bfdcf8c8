"""``benchmark.py kmeans``: hierarchical k-means beside flat Faiss, and what it would cost on 64 GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmark.measure import describe_host
from benchmark.report import Case, Report
from megaregion.errors import UserError

if TYPE_CHECKING:
    from megaregion.curation.kmeans.cost import Work

HELP = "hierarchical k-means against flat Faiss k-means, and a projection to 2 billion regions"
DESCRIPTION = (
    "Ratios are peer / ours, for times and inertia alike: an inertia ratio of 0.97 is 1.03 times flat's. The "
    "lines above the table project the measured speeds to 2 billion x 768, a million centers and 64 GPUs."
)
PAPER_HOURS = 10.0
"""What the RICE paper reports on 64 GPUs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--case", choices=["scenes", "mixture", "all"], default="all", help="which vectors")
    add_data_arguments(parser)
    add("--clusters", type=int, default=1024, help="centers for the scenes")
    add("--passes", type=int, default=10, help="our passes over all vectors after the cells, 1 or more")
    add("--iterations", type=int, default=20, help="our passes of k-means inside the cells")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is clustered."""
    add = parser.add_argument
    add(
        "--features",
        type=Path,
        default=Path("data/benchmark/lite0.npy"),
        metavar="FILE",
        help="embeddings of crops of scenes; made if missing, in about 6 minutes",
    )
    add("--crops", type=int, default=50_000, help="crops of scenes that are embedded")
    add("--vectors", type=int, default=200_000, help="vectors of the mixture of Gaussians, 128 channels")
    add("--components", type=int, default=20_000, help="its Gaussians, and as many centers")
    add("--spread", type=float, default=1.0, help="length of the noise beside means of length 1")


def check(options: argparse.Namespace) -> None:
    """Refuse sizes that cannot be run.

    Raises:
        UserError: A flag is out of range.
    """
    if options.components < 16 or options.vectors < options.components:
        raise UserError(f"--components must lie in 16..--vectors {options.vectors}, got {options.components}")
    if options.crops < 1024:
        raise UserError(f"--crops must be at least 1024, got {options.crops}")
    if options.spread <= 0:
        raise UserError(f"--spread must be above 0, got {options.spread:g}")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Run the cases that were asked for, and project.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    from benchmark.clusters import compare_kmeans, run_ours
    from benchmark.crops import gaussian_features, scene_features
    from megaregion.curation.kmeans.hierarchy import Plan

    check(options)
    if options.passes < 1 or options.iterations < 1 or not 1 <= options.clusters <= options.crops:
        raise UserError("--passes and --iterations must be at least 1, --clusters in 1..--crops")
    threads = torch.get_num_threads()
    report, runs = Report(describe_host(device)), []

    def plan(clusters: int) -> Plan:
        return Plan.of(clusters, options.iterations, 0, options.passes)

    if options.case != "mixture":
        vectors = scene_features(options.features, options.crops)
        cases, run = compare_kmeans("scenes", vectors, plan(options.clusters), (3.0, 1.03), threads)
        report.cases += cases
        runs.append(run)
    if options.case != "scenes":
        vectors = gaussian_features(options.vectors, 128, options.components, options.spread)
        cases, run = compare_kmeans("mixture", vectors, plan(options.components), (8.0, 1.05), threads)
        report.cases += cases
        runs.append(run)
    clusters = options.clusters if options.case == "scenes" else options.components
    # Smaller runs of ours, to see how time grows.
    runs += [run_ours(vectors[::part], plan(clusters // part), threads) for part in (2, 4)]
    report.cases.append(_project([(run.work, run.seconds) for run in runs], threads, options))
    return report


def _project(runs: list[tuple[list[Work], float]], threads: int, options: argparse.Namespace) -> Case:
    from benchmark.clusters import bare_rate
    from megaregion.curation.kmeans import cost
    from megaregion.curation.kmeans.hierarchy import Plan
    from megaregion.curation.settings import AssignSettings

    fitted, bare, fleet = cost.fit(runs, threads), bare_rate(768, threads), cost.Fleet()
    plan = Plan.of(1_000_000, options.iterations, 0, options.passes)
    work = cost.work_of(2_000_000_000, 768, plan, AssignSettings().assign_probes)
    seconds = cost.project(work, fitted, bare, fleet)
    print(cost.explain(seconds, work, fitted, bare, fleet))
    hours = sum(seconds.values()) / 3600
    return Case("modelled: 2B x 768, 1M centers, 64 GPUs, paper", hours, PAPER_HOURS, 5.0, "h")
