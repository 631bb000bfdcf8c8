"""``benchmark.py assign``: labels by probing cells of centers beside exact search."""

from __future__ import annotations

import argparse

import torch

from benchmark.commands.kmeans import add_data_arguments, check
from benchmark.measure import describe_host
from benchmark.report import Report
from megaregion.errors import UserError

HELP = "nearest-center labels by probing against exact search"
DESCRIPTION = "Ratios are exact / ours for times; for labels, the share that agrees with exact search."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    from megaregion.curation.settings import AssignSettings

    add = parser.add_argument
    add("--case", choices=["scenes", "mixture", "all"], default="all", help="which vectors")
    add_data_arguments(parser)
    add("--clusters", type=int, default=20_000, help="centers for the scenes")
    add("--probes", type=int, default=AssignSettings().assign_probes, help="cells that are looked through")
    add("--passes", type=int, default=2, help="passes of the k-means that makes the centers")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Find centers with our k-means, then label all vectors both ways.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    from benchmark.clusters import compare_assign, run_ours
    from benchmark.crops import gaussian_features, scene_features
    from megaregion.curation.kmeans.hierarchy import Plan

    check(options)
    if options.probes < 1 or options.passes < 0 or not 16 <= options.clusters <= options.crops:
        raise UserError("--probes must be at least 1, --passes 0 or more, --clusters in 16..--crops")
    threads = torch.get_num_threads()
    report = Report(describe_host(device))
    if options.case != "mixture":
        vectors = scene_features(options.features, options.crops)
        centers = run_ours(vectors, Plan.of(options.clusters, 10, 0, options.passes), threads).centers
        report.cases += compare_assign("scenes", vectors, centers, options.probes, threads)
    if options.case != "scenes":
        vectors = gaussian_features(options.vectors, 128, options.components, options.spread)
        centers = run_ours(vectors, Plan.of(options.components, 10, 0, 10), threads).centers
        report.cases += compare_assign("mixture", vectors, centers, options.probes, threads)
    return report
