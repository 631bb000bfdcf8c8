"""The k-means and assignment benchmarks: ours beside plain Faiss on the same vectors, in one run.

Shapes: n vectors of C channels, K centers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmark.report import Case
from megaregion.curation.kmeans.cost import Work, work_of
from megaregion.curation.kmeans.features import Vectors, in_chunks
from megaregion.curation.kmeans.hierarchy import Plan, cluster, in_order
from megaregion.curation.kmeans.kmeans import Clustering, find_centers, nearest
from megaregion.curation.kmeans.probing import build_probing

FLAT_ITERATIONS = 25
"""Faiss's own default; it ends earlier where nothing moves any more."""
ASSIGNED = 16_384
"""Vectors that one thread labels at a time."""


@dataclass(frozen=True)
class Run:
    """One k-means of ours: its centers, its length, and the work it did."""

    centers: Vectors
    seconds: float
    work: list[Work]


def timed(work: Callable[[], Run | Clustering | Vectors]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run_ours(vectors: Vectors, plan: Plan, threads: int) -> Run:
    """Cluster in cells with refinement; the bar counts route, split and each pass."""
    with tqdm(total=2 + plan.passes, desc="in cells", unit="step", disable=None) as bar:
        began = time.perf_counter()
        found = cluster(vectors, plan, threads, lambda step: _advance(bar, step))
        seconds = time.perf_counter() - began
    # The last step labels all vectors, which k-means does not.
    work = work_of(len(vectors), vectors.shape[1], plan, probes=1)[:-1]
    return Run(found.centers, seconds, work)


def compare_kmeans(
    name: str, vectors: Vectors, plan: Plan, goals: tuple[float, float], threads: int
) -> tuple[list[Case], Run]:
    """Ours against flat k-means with Faiss.

    Args:
        name: What the vectors are.
        vectors: Unit vectors, float32 [n, C].
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
    exact, cosines = _exact(vectors, probing.centers, threads)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    _faiss_exact(vectors, probing.centers, threads)
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


def bare_rate(channels: int, threads: int) -> float:
    """Floating-point operations per second of a plain search."""
    rng = np.random.Generator(np.random.Philox(key=0))
    vectors = rng.standard_normal((4096, channels), dtype=np.float32)
    centers = vectors[:2048].copy()
    best = min(timed(lambda: _exact(vectors, centers, threads)[1]) for _ in range(3))
    return 2.0 * len(vectors) * len(centers) * channels / best


def _exact(vectors: Vectors, centers: Vectors, threads: int) -> tuple[NDArray[np.int64], Vectors]:
    """The nearest of all centers, and the cosine to it."""
    parts = in_order(threads, lambda part: nearest(part, centers, 1), list(in_chunks(vectors, ASSIGNED)))
    labels, cosines = (np.concatenate([part[which] for part in parts])[:, 0] for which in (0, 1))
    return labels, cosines


def _faiss_exact(vectors: Vectors, centers: Vectors, threads: int) -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    faiss.knn(vectors, centers, 1, metric=faiss.METRIC_INNER_PRODUCT)
    faiss.omp_set_num_threads(before)


def _inertia(vectors: Vectors, centers: Vectors, threads: int) -> float:
    """Sum of squared distances to the nearest center, by exact search."""
    cosines = _exact(vectors, centers, threads)[1]
    return float((2 - 2 * cosines.astype(np.float64)).sum())


def _passes_to(flat: Clustering, inertia: float, count: int) -> int:
    """Passes after which flat k-means is as good; all of them if it never is."""
    # Faiss sums cosines where it is spherical: 2 - 2 cosine is the squared distance of unit vectors.
    reached = [number for number, value in enumerate(flat.objective, 1) if 2 * count - 2 * value <= inertia]
    return reached[0] if reached else len(flat.objective)


def _advance(bar: tqdm[None], step: str) -> None:
    bar.set_postfix_str(step)
    bar.update()
