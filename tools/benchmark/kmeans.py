"""Exact k-means and exact labels beside Faiss's, on crops of scenes and on a mixture of Gaussians."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmark.measure import Stopwatch
from benchmark.part import Case, part
from benchmark.scenes import scene_features
from megaregion.bounds import COUNT, Choice, File, Positive, PositiveInt, Whole
from megaregion.curation.embeddings import Embeddings, unit
from megaregion.curation.kmeans import LADDER, TILE, Pass, find_centers, nearest, passes
from megaregion.curation.settings import AssignSettings, ClusterSettings
from megaregion.errors import UserError
from megaregion.processor import in_order, keep_freed_memory, product

Vectors = NDArray[np.float32]

FLAT_ITERATIONS = 25
"""Faiss's own default; it ends earlier where nothing moves any more."""
TO_INERTIA, IN_ALL, INERTIA = 4.0, 8.0, {"scenes": 1 / 0.999, "mixture": 1.0}
"""How many times faster than flat k-means to the same inertia and in all, and its inertia over ours."""
SEARCH = 3.0
"""How many times faster than Faiss's search."""
VECTORS = (
    ("--case", Choice(("scenes", "mixture", "all")), "all", "which vectors"),
    ("--features", File, Path("data/benchmark/lite0.npy"),
     " embeddings of crops of scenes; made if missing, in about 6 minutes"),
    ("--crops", Whole(1024, COUNT), 50_000, "crops of scenes that are embedded"),
    ("--vectors", Whole(16, COUNT), 200_000, "vectors of the mixture of Gaussians, 128 channels"),
    ("--components", Whole(16, COUNT), 20_000, "its Gaussians, and as many centers"),
    ("--spread", Positive, 1.0, "length of the noise beside means of length 1"),
)  # fmt: skip


@part(
    *VECTORS,
    ("--clusters", PositiveInt, 1024, "centers for the scenes"),
    ("--passes", PositiveInt, 20, "our exact passes, at most"),
)
def kmeans(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Exact k-means beside flat Faiss k-means.

    Ratios are peer / ours, for times and inertia alike. The first line of each case is the fair one: our time
    until flat's final inertia is reached, against flat's time until it reaches ours (all of it where it never
    does). The last is the floor: the products that were looked at, at the rate of bare ones.
    """
    for name, vectors, clusters in _vectors(options):
        yield from _compare_kmeans(name, vectors, ClusterSettings(clusters, options.passes), watch)


@part(
    *VECTORS,
    ("--clusters", Whole(16, COUNT), 20_000, "centers for the scenes"),
    ("--passes", PositiveInt, 1, "passes of the k-means that makes the centers"),
)
def assign(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Labels by exact search, ours beside Faiss's.

    Ratios are Faiss / ours for times; for labels, the share that is as near as Faiss's.
    """
    for name, vectors, clusters in _vectors(options):
        if watch.counts:
            yield from _count_assign(_label(name, vectors, clusters), vectors, clusters, watch)
            continue
        centers, _ = _run_ours(vectors, ClusterSettings(clusters, options.passes), watch.device)
        yield from _compare_assign(_label(name, vectors, clusters), vectors, centers, watch)


def _vectors(options: argparse.Namespace) -> Iterator[tuple[str, Vectors, int]]:
    """Each set of unit vectors that was asked for: its name, [count, channels], and the number of centers.

    Raises:
        UserError: A flag is out of range.
    """
    if options.vectors < options.components:
        raise UserError(f"--components must be at most --vectors {options.vectors}, got {options.components}")
    if options.clusters > options.crops:
        raise UserError(f"--clusters must be at most --crops {options.crops}, got {options.clusters}")
    if options.case != "mixture":
        yield "scenes", scene_features(options.features, options.crops), options.clusters
    if options.case != "scenes":
        mixture = gaussian_features(options.vectors, 128, options.components, options.spread)
        yield "mixture", mixture, options.components


def gaussian_features(count: int, channels: int, components: int, spread: float, seed: int = 0) -> Vectors:
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


def _label(name: str, vectors: Vectors, clusters: int) -> str:
    return f"{name}, n={len(vectors):,} C={vectors.shape[1]} K={clusters:,}"


def _run_ours(
    vectors: Vectors, settings: ClusterSettings, device: torch.device
) -> tuple[torch.Tensor, list[tuple[float, Pass]]]:
    """Cluster; the centers, and the seconds at which each pass ended."""
    told: list[tuple[float, Pass]] = []
    keep_freed_memory()
    with tqdm(total=settings.cluster_iterations, desc="exact passes", unit="pass", disable=None) as bar:
        began = time.perf_counter()
        embeddings = Embeddings([vectors], AssignSettings().chunk_memory, device)
        for done in passes(embeddings, settings):
            told.append((time.perf_counter() - began, done))
            bar.update()
        return done.centers, told


def _compare_kmeans(
    name: str, vectors: Vectors, settings: ClusterSettings, watch: Stopwatch
) -> Iterator[Case]:
    """Ours against flat k-means with Faiss on as many threads."""
    threads, count, device = torch.get_num_threads(), len(vectors), watch.device
    centers, told = _run_ours(vectors, settings, device)
    (flat, cosines), flat_seconds = watch.timed(
        lambda: find_centers(vectors, settings.clusters, FLAT_ITERATIONS, settings.cluster_seed, threads)
    )
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
    floor = scored * _bare_seconds(tensor, settings.clusters, watch)
    label = _label(name, vectors, settings.clusters)
    yield Case(
        f"{label}: until the other's inertia", reached[0] if reached else seconds, until, "s", TO_INERTIA
    )
    yield Case(f"{label}: flat, {len(cosines)} passes", seconds, flat_seconds, "s", IN_ALL)
    yield Case(f"{label}: inertia, flat", ours, peer, "", INERTIA[name])
    yield Case(f"{label}: bare products of {scored:.1f} passes of {len(told)}", seconds, floor, "s")


def _compare_assign(label: str, vectors: Vectors, centers: torch.Tensor, watch: Stopwatch) -> Iterator[Case]:
    """Ours against Faiss, on the same threads."""
    tensor, plain = torch.from_numpy(vectors).to(watch.device), centers.cpu().numpy()
    labels, ours = watch.timed(lambda: nearest(tensor, centers).labels.cpu())
    theirs, by_faiss = watch.timed(lambda: _faiss_search(vectors, plain, torch.get_num_threads()))
    floor = _bare_seconds(tensor, len(centers), watch)
    # Where the two differ, float64 tells whose is nearer.
    rows = (labels != theirs).nonzero()[:, 0]
    own, other = ((tensor[rows].double() * centers[each[rows]].double()).sum(1) for each in (labels, theirs))
    right = 1 - int((own < other - 1e-12).sum()) / len(labels)
    yield Case(f"{label}: exact search by Faiss", ours, by_faiss, "s", SEARCH)
    yield Case(f"{label}: bare products", ours, floor, "s")
    # 1 is the most that exact search agrees with itself, so the ratio is the agreement.
    yield Case(f"{label}: labels as near as Faiss's ({len(rows)} differ)", 1.0, right, "", 1.0)


def _count_assign(label: str, vectors: Vectors, clusters: int, watch: Stopwatch) -> Iterator[Case]:
    """What exact search asks of a GPU; how many vectors are scored again, nobody knows: none."""
    tensor, centers = (
        torch.randn(count, vectors.shape[1], device=watch.device) for count in (len(vectors), clusters)
    )
    found = watch.fastest({"exact search": lambda: nearest(tensor, centers).labels.cpu()}, 1)["exact search"]
    yield Case(f"{label}: exact search by Faiss", found, found, "s", SEARCH)
    yield Case(f"{label}: bare products", found, _bare_seconds(tensor, clusters, watch), "s")
    why = "no numbers are there to compare"
    yield Case(f"{label}: labels as near as Faiss's", 0, 0, "", 1.0, unmeasured=why)


def _faiss_search(vectors: Vectors, centers: Vectors, threads: int) -> torch.Tensor:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    _, labels = faiss.knn(vectors, centers, 1, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(before)
    return torch.from_numpy(labels[:, 0])


def _bare_seconds(vectors: torch.Tensor, clusters: int, watch: Stopwatch) -> float:
    """Seconds of a pass if it were nothing but its first products, on all threads."""
    height, width = TILE[vectors.device.type]
    operands = vectors[: 4 * height].to(LADDER[vectors.device.type][0])
    centers, starts = operands[:width].clone(), range(0, len(operands), height)
    products = partial(in_order, lambda at: product(operands[at : at + height], centers), starts)
    seconds = watch.fastest({"bare products": products}, 3)["bare products"]
    return seconds * len(vectors) * clusters / (len(operands) * len(centers))
