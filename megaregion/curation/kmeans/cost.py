"""What clustering and assigning cost at a size: work counted from the algorithm, speed fitted to runs.

Seconds of a run are modelled as products / rate + elements * handling: ``products`` are the multiply-adds
(times 2) of all matrix products, ``elements`` the channels of all vectors that pass by in all steps. Both
coefficients are fitted to runs of several sizes. On other machines the same share of the bare matrix rate
is taken, the same handling on every core, and the files are read and written at the disks' rate.

Shapes: n vectors of C channels, G cells, K centers, L cells of centers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from megaregion.curation.kmeans.hierarchy import COARSE_ITERATIONS, SAMPLE, Plan
from megaregion.curation.kmeans.probing import BLOCK, CLIMBS, NEIGHBOURS

OVERLAP = 0.8
"""Share of a block's neighbours that are different centers: 0.75 to 0.8 was seen at 2,500 centers."""
HALF = 2
"""Bytes of a channel on disk."""


@dataclass(frozen=True)
class Work:
    """What one step costs, whatever the machine."""

    step: str
    products: float
    """Floating-point operations of matrix products that any GPU can share."""
    elements: float
    """Channels of vectors that are handled: copied, sorted, added up."""
    disk: float
    """Bytes read and written."""
    lone_products: float = 0.0
    """Floating-point operations that one GPU does while the others wait."""


@dataclass(frozen=True)
class Fit:
    """Speeds of a machine, fitted to runs."""

    rate: float
    """Floating-point operations per second inside the algorithm."""
    handling: float
    """Seconds for a channel of a vector, on all threads of the run together."""
    threads: int
    error: float
    """Greatest relative error of the fit over its runs."""


@dataclass(frozen=True)
class Fleet:
    """The machines of a projection; every number is an assumption that is printed with the outcome."""

    gpus: int = 64
    gpu_rate: float = 30e12
    """Bare single-precision matrix products of one GPU through faiss, per second; an H100 can do 50e12."""
    cores_per_gpu: int = 12
    disk: float = 40e9
    """Bytes per second of the shared disk, all nodes together."""


def work_of(vectors: int, channels: int, plan: Plan, probes: int) -> list[Work]:
    """Count the work of every step, labels of all vectors included."""
    n, width, k, g = float(vectors), 2.0 * channels, float(plan.clusters), float(plan.cells)
    file = n * channels * HALF
    candidates = min(OVERLAP * plan.neighbours**2, k)
    probed = 2 * k**0.5
    around = min(OVERLAP * BLOCK * NEIGHBOURS, k)
    looked_at = probed + min(probes, probed) * k / probed + CLIMBS * around
    moving = Work(
        f"{plan.passes} passes",
        ((plan.passes - plan.whole) * candidates + plan.whole * k) * n * width,
        plan.passes * n * channels,
        # Partial sums: most cells touch their own centers and some of the cells around.
        plan.passes * (file + 10 * k * channels * 4),
        (plan.passes - plan.whole) * k * k * width,
    )
    return [
        Work("coarse", 0, 0, SAMPLE * g * channels * HALF, COARSE_ITERATIONS * SAMPLE * g * g * width),
        # Read, written, and read again for the checksum.
        Work("route", n * g * width, n * channels, 3 * file),
        Work("split", n * (k / g) * width * (plan.iterations + 1), n * channels, 2 * file),
        moving,
        Work("assign", n * looked_at * width, n * channels * (1 + CLIMBS), file, k * k * width),
    ]


def fit(runs: Sequence[tuple[list[Work], float]], threads: int) -> Fit:
    """Fit both coefficients to runs (their work, seconds), each weighted by its own length."""
    products = np.array([sum(w.products + w.lone_products for w in work) for work, _ in runs])
    elements = np.array([sum(w.elements for w in work) for work, _ in runs])
    seconds = np.array([each for _, each in runs])
    terms = np.stack([products, elements], axis=1) / seconds[:, None]
    scale = terms.max(axis=0)
    (per_product, handling), _ = nnls(terms / scale, np.ones(len(runs)))
    found = np.array([per_product, handling]) / scale
    error = float(np.abs(terms @ found - 1).max())
    # All time in handling would make the products free: no slower than they were measured, at least.
    rate = 1 / found[0] if found[0] else (products / seconds).max()
    return Fit(float(rate), float(found[1]), threads, error)


def project(work: Sequence[Work], fitted: Fit, bare_rate: float, fleet: Fleet) -> dict[str, float]:
    """Seconds of each step on a fleet, with reading and writing not hidden behind the work.

    Args:
        work: What :func:`work_of` counted.
        fitted: Speeds that were measured.
        bare_rate: Bare matrix products per second of the machine that was fitted.
        fleet: Where to.
    """
    rate = fleet.gpu_rate * min(1.0, fitted.rate / bare_rate)
    handling = fitted.handling * fitted.threads / (fleet.gpus * fleet.cores_per_gpu)
    return {
        each.step: each.products / (rate * fleet.gpus)
        + each.lone_products / rate
        + each.elements * handling
        + each.disk / fleet.disk
        for each in work
    }


def explain(seconds: dict[str, float], work: Sequence[Work], fitted: Fit, bare: float, fleet: Fleet) -> str:
    """The projection with everything it assumes, as lines of text."""
    steps = ", ".join(f"{step} {value / 60:.1f} min" for step, value in seconds.items())
    disk = sum(each.disk for each in work)
    return "\n".join(
        [
            f"measured here: {fitted.rate / 1e9:.0f} GFLOP/s inside the algorithm, {bare / 1e9:.0f} bare; "
            f"{fitted.handling * 1e9:.2f} ns a channel on {fitted.threads} threads; fit within "
            f"{100 * fitted.error:.0f}%",
            f"assumed: {fleet.gpus} GPUs of {fleet.gpu_rate / 1e12:.0f} TFLOP/s bare, the same share of it "
            f"inside the algorithm, {fleet.cores_per_gpu} cores each; centers' neighbours are found by one; "
            f"a disk of {fleet.disk / 1e9:.0f} GB/s for all; {disk / 1e12:.0f} TB of it, not overlapped",
            f"modelled: {steps}; {sum(seconds.values()) / 3600:.2f} h in all",
        ]
    )
