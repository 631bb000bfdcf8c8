"""Hierarchical k-means beside flat Faiss k-means, and a projection to 2 billion regions.

Ratios are peer / ours, for times and inertia alike: an inertia ratio of 0.97 is 1.03 times flat's. The
lines above the table project the measured speeds to 2 billion x 768, a million centers and 64 GPUs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmark.measure import describe_host
from benchmark.report import Case, Report
from benchmark.scenes import scene_features
from megaregion.bounds import Positive
from megaregion.command_line import flag, path, whole
from megaregion.curation.kmeans import cost
from megaregion.curation.kmeans.features import Vectors, in_chunks
from megaregion.curation.kmeans.hierarchy import Plan, cluster, in_order
from megaregion.curation.kmeans.kmeans import Clustering, find_centers, nearest
from megaregion.curation.settings import AssignSettings
from megaregion.curation.types import unit
from megaregion.errors import UserError

FLAT_ITERATIONS = 25
"""Faiss's own default; it ends earlier where nothing moves any more."""
ASSIGNED = 16_384
"""Vectors that one thread labels at a time."""
PAPER_HOURS = 10.0
"""What the RICE paper reports on 64 GPUs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add_data_arguments(parser)
    add = parser.add_argument
    add("--clusters", type=whole(), default=1024, help="centers for the scenes")
    add("--passes", type=whole(), default=10, help="our passes over all vectors after the cells")
    add("--iterations", type=whole(), default=20, help="our passes of k-means inside the cells")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is clustered."""
    add = parser.add_argument
    add("--case", choices=["scenes", "mixture", "all"], default="all", help="which vectors")
    add(
        "--features",
        type=path,
        default=Path("data/benchmark/lite0.npy"),
        metavar="FILE",
        help="embeddings of crops of scenes; made if missing, in about 6 minutes",
    )
    add("--crops", type=whole(1024), default=50_000, help="crops of scenes that are embedded")
    add(
        "--vectors", type=whole(16), default=200_000, help="vectors of the mixture of Gaussians, 128 channels"
    )
    add("--components", type=whole(16), default=20_000, help="its Gaussians, and as many centers")
    add("--spread", type=flag(Positive), default=1.0, help="length of the noise beside means of length 1")


def vectors_of(options: argparse.Namespace) -> dict[str, Callable[[], Vectors]]:
    """The vectors that were asked for, by name; each is made when it is called.

    Raises:
        UserError: A flag is out of range.
    """
    if options.vectors < options.components:
        raise UserError(f"--components must be at most --vectors {options.vectors}, got {options.components}")
    made: dict[str, Callable[[], Vectors]] = {
        "scenes": lambda: scene_features(options.features, options.crops),
        "mixture": lambda: gaussian_features(options.vectors, 128, options.components, options.spread),
    }
    return {name: make for name, make in made.items() if options.case in (name, "all")}


def gaussian_features(
    count: int, channels: int, components: int, spread: float, seed: int = 0
) -> NDArray[np.float32]:
    """Unit vectors around random directions, [count, channels].

    Args:
        count: Vectors.
        channels: Channels of each.
        components: Gaussians of the mixture, equally likely.
        spread: Length of the noise, where the means have length 1.
        seed: Seed of means and noise.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    means = unit(rng.standard_normal((components, channels), dtype=np.float32))
    noise = rng.standard_normal((count, channels), dtype=np.float32) * (spread / channels**0.5)
    return unit(means[rng.integers(components, size=count)] + noise)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Run the cases that were asked for, and project.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    made = vectors_of(options)
    if options.clusters > options.crops:
        raise UserError(f"--clusters must be at most --crops {options.crops}, got {options.clusters}")
    threads = torch.get_num_threads()
    clusters = {"scenes": options.clusters, "mixture": options.components}
    goals = {"scenes": (3.0, 1.03), "mixture": (8.0, 1.05)}
    report, runs = Report(describe_host(device)), []

    def plan(clusters: int) -> Plan:
        return Plan.of(clusters, options.iterations, 0, options.passes)

    for name, make in made.items():
        vectors = make()
        cases, run = compare_kmeans(name, vectors, plan(clusters[name]), goals[name], threads)
        report.cases += cases
        runs.append(run)
    # Smaller runs of ours, to see how time grows.
    runs += [run_ours(vectors[::part], plan(clusters[name] // part), threads) for part in (2, 4)]
    report.cases.append(_project(runs, threads, options))
    return report


@dataclass(frozen=True)
class Run:
    """One k-means of ours: its centers, its length, and the work it did."""

    centers: Vectors
    seconds: float
    work: list[cost.Work]


def run_ours(vectors: Vectors, plan: Plan, threads: int) -> Run:
    """Cluster in cells with refinement; the bar counts route, split and each pass."""

    def advance(step: str) -> None:
        bar.set_postfix_str(step)
        bar.update()

    with tqdm(total=2 + plan.passes, desc="in cells", unit="step", disable=None) as bar:
        began = time.perf_counter()
        found = cluster(vectors, plan, threads, advance)
        seconds = time.perf_counter() - began
    # The last step labels all vectors, which k-means does not.
    work = cost.work_of(len(vectors), vectors.shape[1], plan, probes=1)[:-1]
    return Run(found.centers, seconds, work)


def compare_kmeans(
    name: str, vectors: Vectors, plan: Plan, goals: tuple[float, float], threads: int
) -> tuple[list[Case], Run]:
    """Ours against flat k-means with Faiss.

    Args:
        name: What the vectors are.
        vectors: Unit vectors, float32 [n, channels].
        plan: Our sizes.
        goals: How many times faster, and the greatest inertia relative to flat.
        threads: Threads of both.
    """
    ours = run_ours(vectors, plan, threads)
    bare = run_ours(vectors, Plan.of(plan.clusters, plan.iterations, plan.seed, 0), threads)
    began = time.perf_counter()
    flat = find_centers(vectors, plan.clusters, FLAT_ITERATIONS, plan.seed, threads)
    seconds = time.perf_counter() - began
    inertia = {
        who: _inertia(vectors, centers, threads)
        for who, centers in (("ours", ours.centers), ("bare", bare.centers), ("flat", flat.centers))
    }
    label = f"{name}, n={len(vectors):,} C={vectors.shape[1]} K={plan.clusters:,}"
    done = len(flat.objective)
    same = _passes_to(flat, inertia["ours"], len(vectors))
    return [
        Case(f"{label}: flat, {done} passes", ours.seconds, seconds, goals[0], "s"),
        Case(f"{label}: flat, stopped at our inertia", ours.seconds, seconds * same / done, 0, "s"),
        Case(f"{label}: inertia, flat", inertia["ours"], inertia["flat"], 1 / goals[1], ""),
        Case(f"{label}: inertia, cells not refined", inertia["ours"], inertia["bare"], 0, ""),
        Case(f"{label}: time, cells not refined", ours.seconds, bare.seconds, 0, "s"),
    ], ours


def exact_search(vectors: Vectors, centers: Vectors, threads: int) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest of all centers, and the cosine to it; both [n]."""
    parts = in_order(threads, lambda part: nearest(part, centers, 1), list(in_chunks(vectors, ASSIGNED)))
    labels, cosines = (np.concatenate([part[which] for part in parts])[:, 0] for which in (0, 1))
    return labels, cosines


def _inertia(vectors: Vectors, centers: Vectors, threads: int) -> float:
    """Sum of squared distances to the nearest center."""
    cosines = exact_search(vectors, centers, threads)[1]
    return float((2 - 2 * cosines.astype(np.float64)).sum())


def _passes_to(flat: Clustering, inertia: float, count: int) -> int:
    """Passes after which flat k-means is as good; all of them if it never is."""
    # Faiss sums cosines where it is spherical: 2 - 2 cosine is the squared distance of unit vectors.
    reached = [number for number, value in enumerate(flat.objective, 1) if 2 * count - 2 * value <= inertia]
    return reached[0] if reached else len(flat.objective)


def _project(runs: list[Run], threads: int, options: argparse.Namespace) -> Case:
    """What 2 billion regions would take at the speed of these runs; says how it comes to that."""
    fitted = cost.fit([(run.work, run.seconds) for run in runs], threads)
    bare, fleet = _bare_rate(768, threads), cost.Fleet()
    plan = Plan.of(1_000_000, options.iterations, 0, options.passes)
    work = cost.work_of(2_000_000_000, 768, plan, AssignSettings().assign_probes)
    seconds = cost.project(work, fitted, bare, fleet)
    print(cost.explain(seconds, work, fitted, bare, fleet))
    hours = sum(seconds.values()) / 3600
    return Case("modelled: 2B x 768, 1M centers, 64 GPUs, paper", hours, PAPER_HOURS, 5.0, "h")


def _bare_rate(channels: int, threads: int) -> float:
    """Floating-point operations per second of a plain search."""
    rng = np.random.Generator(np.random.Philox(key=0))
    vectors = rng.standard_normal((4096, channels), dtype=np.float32)
    centers, seconds = vectors[:2048].copy(), []
    for _ in range(3):
        began = time.perf_counter()
        exact_search(vectors, centers, threads)
        seconds.append(time.perf_counter() - began)
    return 2.0 * len(vectors) * len(centers) * channels / min(seconds)
