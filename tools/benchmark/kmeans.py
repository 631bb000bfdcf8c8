"""Exact k-means beside flat Faiss k-means.

Ratios are peer / ours, for times and inertia alike. The first line of each case is the fair one: our time
until flat's final inertia is reached, against flat's time until it reaches ours (all of it where it never
does). The last is the floor: the products that were looked at, at the rate of bare ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
from megaregion.curation.embeddings import Embeddings, unit
from megaregion.curation.kmeans import Pass, cluster, find_centers
from megaregion.curation.nearest import in_order, nearest
from megaregion.curation.settings import AssignSettings, ClusterSettings
from megaregion.errors import UserError
from megaregion.processor import keep_freed_memory, product

Vectors = NDArray[np.float32]

FLAT_ITERATIONS = 25
"""Faiss's own default; it ends earlier where nothing moves any more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add_data_arguments(parser)
    add = parser.add_argument
    add("--clusters", type=whole(), default=1024, help="centers for the scenes")
    add("--passes", type=whole(), default=20, help="our exact passes, at most")


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
    """Run the cases that were asked for.

    Raises:
        UserError: A flag is out of range, or the file of embeddings is of another kind.
    """
    made = vectors_of(options)
    if options.clusters > options.crops:
        raise UserError(f"--clusters must be at most --crops {options.crops}, got {options.clusters}")
    clusters = {"scenes": options.clusters, "mixture": options.components}
    goals = {"scenes": (4.0, 8.0, 0.999), "mixture": (4.0, 8.0, 1.0)}
    report = Report(describe_host(device))
    for name, make in made.items():
        report.cases += compare_kmeans(
            name, make(), ClusterSettings(clusters[name], options.passes), goals[name], device
        )
    return report


def run_ours(
    vectors: Vectors, settings: ClusterSettings, device: torch.device
) -> tuple[torch.Tensor, list[tuple[float, Pass]]]:
    """Cluster; the centers, and the seconds at which each pass ended."""
    told: list[tuple[float, Pass]] = []
    keep_freed_memory()
    with tqdm(total=settings.cluster_iterations, desc="exact passes", unit="pass", disable=None) as bar:
        began = time.perf_counter()

        def tell(done: Pass) -> None:
            told.append((time.perf_counter() - began, done))
            bar.update()

        embeddings = Embeddings([vectors], AssignSettings().chunk_memory, device)
        centers = cluster(embeddings, settings, on_pass=tell)
    return centers, told


def compare_kmeans(
    name: str,
    vectors: Vectors,
    settings: ClusterSettings,
    goals: tuple[float, float, float],
    device: torch.device,
) -> list[Case]:
    """Ours against flat k-means with Faiss on as many threads.

    Args:
        name: What the vectors are.
        vectors: Unit vectors, float32 [n, channels].
        settings: Our sizes.
        goals: How many times faster to the same inertia and in all, and the most inertia relative to flat.
        device: Where ours runs.
    """
    threads, count = torch.get_num_threads(), len(vectors)
    centers, told = run_ours(vectors, settings, device)
    began = time.perf_counter()
    flat, cosines = find_centers(vectors, settings.clusters, FLAT_ITERATIONS, settings.cluster_seed, threads)
    flat_seconds = time.perf_counter() - began
    tensor = torch.from_numpy(vectors).to(device)
    ours, peer = (
        float((2 - 2 * nearest(tensor, each.to(device)).best.double()).sum())
        for each in (centers, torch.from_numpy(flat))
    )
    seconds = told[-1][0]
    # A pass tells the inertia of the centers that it began with.
    reached = [at for at, done in told if count * (2 - 2 * done.cosine) <= peer]
    same = [number for number, value in enumerate(cosines, 1) if 2 * count - 2 * value <= ours]
    until = flat_seconds * (same[0] if same else len(cosines)) / len(cosines)
    scored = sum(done.scored for _, done in told)
    floor = scored / bare_rate(tensor, settings.clusters)
    label = f"{name}, n={count:,} C={vectors.shape[1]} K={settings.clusters:,}"
    return [
        Case(f"{label}: until the other's inertia", reached[0] if reached else seconds, until, goals[0], "s"),
        Case(f"{label}: flat, {len(cosines)} passes", seconds, flat_seconds, goals[1], "s"),
        Case(f"{label}: inertia, flat", ours, peer, 1 / goals[2], ""),
        Case(f"{label}: bare products of {scored:.1f} passes of {len(told)}", seconds, floor, 0, "s"),
    ]


def bare_rate(vectors: torch.Tensor, clusters: int) -> float:
    """Passes a second if a pass were nothing but its products, on all threads."""
    rows, centers = vectors[:4096], vectors[:2048].clone()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        in_order(lambda start: product(rows[start : start + 1024], centers), range(0, len(rows), 1024))
        seconds.append(time.perf_counter() - began)
    return len(rows) * len(centers) / min(seconds) / (len(vectors) * clusters)
