"""Labels by exact search, ours beside Faiss's.

Ratios are Faiss / ours for times; for labels, the share that is as near as Faiss's.
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from benchmark.kmeans import Vectors, add_data_arguments, bare_rate, run_ours, vectors_of
from benchmark.measure import describe_host
from benchmark.report import Case, Report
from megaregion.command_line import whole
from megaregion.curation.nearest import nearest
from megaregion.curation.settings import ClusterSettings
from megaregion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add_data_arguments(parser)
    add = parser.add_argument
    add("--clusters", type=whole(16), default=20_000, help="centers for the scenes")
    add("--passes", type=whole(), default=1, help="passes of the k-means that makes the centers")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Find centers with our k-means, then label all vectors both ways.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    made = vectors_of(options)
    if options.clusters > options.crops:
        raise UserError(f"--clusters must be at most --crops {options.crops}, got {options.clusters}")
    clusters = {"scenes": options.clusters, "mixture": options.components}
    report = Report(describe_host(device))
    for name, make in made.items():
        vectors = make()
        centers, _ = run_ours(vectors, ClusterSettings(clusters[name], options.passes), device)
        report.cases += compare_assign(name, torch.from_numpy(vectors).to(device), centers)
    return report


def compare_assign(name: str, vectors: torch.Tensor, centers: torch.Tensor) -> list[Case]:
    """Ours against Faiss, on the same threads."""
    began = time.perf_counter()
    labels = nearest(vectors, centers).labels.cpu()
    ours = time.perf_counter() - began
    began = time.perf_counter()
    theirs = _faiss_search(vectors.cpu().numpy(), centers.cpu().numpy(), torch.get_num_threads())
    by_faiss = time.perf_counter() - began
    floor = 1 / bare_rate(vectors, len(centers))
    # Where the two differ, float64 tells whose is nearer.
    rows = (labels != torch.from_numpy(theirs)).nonzero()[:, 0]
    own, other = (
        (vectors[rows].double() * centers[each[rows]].double()).sum(1)
        for each in (labels, torch.from_numpy(theirs))
    )
    wrong = int((own < other - 1e-12).sum())
    label = f"{name}, n={len(vectors):,} C={vectors.shape[1]} K={len(centers):,}"
    return [
        Case(f"{label}: exact search by Faiss", ours, by_faiss, 3.0, "s"),
        Case(f"{label}: bare products", ours, floor, 0, "s"),
        # 1 is the most that exact search agrees with itself, so the ratio is the agreement.
        Case(
            f"{label}: labels as near as Faiss's ({len(rows)} differ)", 1.0, 1 - wrong / len(labels), 1.0, ""
        ),
    ]


def _faiss_search(vectors: Vectors, centers: Vectors, threads: int) -> NDArray[np.int64]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    _, labels = faiss.knn(vectors, centers, 1, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(before)
    return labels[:, 0].astype(np.int64)
