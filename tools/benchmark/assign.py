"""Nearest-center labels by probing cells of centers, beside exact search.

Ratios are exact / ours for times; for labels, the share that agrees with exact search.
"""

from __future__ import annotations

import argparse
import time

import faiss
import numpy as np
import torch

from benchmark.kmeans import ASSIGNED, add_data_arguments, exact_search, run_ours, vectors_of
from benchmark.measure import describe_host
from benchmark.report import Case, Report
from megaregion.command_line import whole
from megaregion.curation.kmeans.features import Vectors, in_chunks
from megaregion.curation.kmeans.hierarchy import Plan, in_order
from megaregion.curation.kmeans.probing import build_probing
from megaregion.curation.settings import AssignSettings
from megaregion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add_data_arguments(parser)
    add = parser.add_argument
    add("--clusters", type=whole(16), default=20_000, help="centers for the scenes")
    add(
        "--probes", type=whole(), default=AssignSettings().assign_probes, help="cells that are looked through"
    )
    add("--passes", type=whole(0), default=2, help="passes of the k-means that makes the scenes' centers")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Find centers with our k-means, then label all vectors both ways.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    made = vectors_of(options)
    if options.clusters > options.crops:
        raise UserError(f"--clusters must be at most --crops {options.crops}, got {options.clusters}")
    threads = torch.get_num_threads()
    plans = {
        "scenes": Plan.of(options.clusters, 10, 0, options.passes),
        "mixture": Plan.of(options.components, 10, 0, 10),
    }
    report = Report(describe_host(device))
    for name, make in made.items():
        vectors = make()
        centers = run_ours(vectors, plans[name], threads).centers
        report.cases += compare_assign(name, vectors, centers, options.probes, threads)
    return report


def compare_assign(name: str, vectors: Vectors, centers: Vectors, probes: int, threads: int) -> list[Case]:
    """Probing against exact search, on the same threads."""
    began = time.perf_counter()
    probing = build_probing(centers, 0, threads)
    built = time.perf_counter() - began
    parts = list(in_chunks(vectors, ASSIGNED))
    began = time.perf_counter()
    found = in_order(threads, lambda part: probing.find(part, probes)[0], parts)
    ours = time.perf_counter() - began
    began = time.perf_counter()
    exact, cosines = exact_search(vectors, probing.centers, threads)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    _faiss_search(vectors, probing.centers, threads)
    by_faiss = time.perf_counter() - began
    labels = np.concatenate(found)
    agreed = float((labels == exact).mean())
    chosen = np.concatenate(
        [np.einsum("nc,nc->n", part, probing.centers[own]) for part, own in zip(parts, found, strict=True)]
    )
    label = f"{name}, n={len(vectors):,} C={vectors.shape[1]} K={len(centers):,} probes={probes}"
    return [
        Case(f"{label}: exact search by Faiss", ours, by_faiss, 5.0, "s"),
        Case(f"{label}: exact search by numpy's products", ours, seconds, 0, "s"),
        Case(f"{label}: building the cells once", built, seconds, 0, "s"),
        # 1 is the most that exact search agrees with itself, so the ratio is the agreement.
        Case(f"{label}: labels as exact search's", 1.0, agreed, 0.99, ""),
        Case(f"{label}: mean cosine to the center", float(chosen.mean()), float(cosines.mean()), 0, ""),
    ]


def _faiss_search(vectors: Vectors, centers: Vectors, threads: int) -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    faiss.knn(vectors, centers, 1, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(before)
