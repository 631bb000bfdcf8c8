"""What faults cost a run: expected goodput by a simulation, and by Young's and Daly's closed form.

    fault | detection + restart | train interval | save | train interval | save | train ... fault
                                                        ^ published write seconds later, beside training
Faults come independently of each other (exponential gaps), also while the run restarts. After a fault the
run goes on from the newest published checkpoint.

Sources: J. Young, A first order approximation to the optimum checkpoint interval, 1974; J. Daly, A higher
order estimate of the optimum checkpoint interval for restart dumps, 2006; the default rate of faults is
Llama 3's (The Llama 3 Herd of Models, section 3.3.4: 419 interruptions in 54 days on 16,384 GPUs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LLAMA3_FAULTS = 419 / (54 * 16_384)
"""Unexpected interruptions per GPU and day."""

DAY = 86_400.0


@dataclass(frozen=True)
class Cluster:
    """A run's size and the times that it was measured to need, in seconds."""

    gpus: int
    faults_per_gpu_day: float = LLAMA3_FAULTS
    save: float = 2.0
    """Training stands still for a save."""
    write: float = 30.0
    """From then until the checkpoint is published, beside training."""
    detection: float = 60.0
    """From a fault until the run has ended."""
    restart: float = 180.0
    """From then until the next start's first step."""

    @property
    def between_faults(self) -> float:
        """Mean seconds between two faults of any of the GPUs."""
        return DAY / (self.gpus * self.faults_per_gpu_day)


def simulate(cluster: Cluster, interval: float, seed: int = 0, faults: int = 100_000) -> float:
    """Share of the wall time that went into steps that count, over many faults.

    Args:
        cluster: Size and times.
        interval: Seconds of training between two saves.
        seed: Seed of the faults' times.
        faults: Faults that are drawn.
    """
    gaps = np.random.default_rng(seed).exponential(cluster.between_faults, faults)
    # From the first step after a restart to the next fault; negative where that came during the restart.
    running = gaps - cluster.detection - cluster.restart
    cycles = np.floor((running - cluster.write) / (interval + cluster.save))
    return float(np.maximum(cycles, 0).sum() * interval / gaps.sum())


def expected(cluster: Cluster, interval: float) -> float:
    """The mean of :func:`simulate` in closed form (Daly's, with the time to publish)."""
    mean = cluster.between_faults
    idle = cluster.detection + cluster.restart + cluster.write
    return interval * math.exp(-idle / mean) / (mean * math.expm1((interval + cluster.save) / mean))


def young(cluster: Cluster) -> float:
    """Young's first-order best interval, sqrt(2 x save x mean time between faults), in seconds."""
    return math.sqrt(2 * cluster.save * cluster.between_faults)


def best_interval(cluster: Cluster, seed: int = 0, faults: int = 100_000) -> float:
    """The interval with the greatest simulated goodput, in seconds, on a grid of 2% steps.

    A save is not begun before the one before is published, so no interval is shorter than ``write``.
    """
    center = max(young(cluster), 1e-3)
    grid = [max(cluster.write, 1e-3, center * 1.02**power) for power in range(-120, 121)]
    return max(grid, key=lambda interval: (simulate(cluster, interval, seed, faults), -interval))


def goodput(
    cluster: Cluster, interval: float | None, seed: int = 0, faults: int = 100_000
) -> dict[str, float]:
    """Goodput at an interval (the best one if None) and at the best one, by name for :func:`table`."""
    best = best_interval(cluster, seed, faults)
    chosen = interval or best
    return {
        "gpus": cluster.gpus,
        "hours_between_faults": cluster.between_faults / 3600,
        "interval": chosen,
        "goodput": simulate(cluster, chosen, seed, faults),
        "closed_form": expected(cluster, chosen),
        "best_interval": best,
        "best_goodput": simulate(cluster, best, seed, faults),
        "young": young(cluster),
    }


def table(rows: Sequence[dict[str, float]]) -> str:
    """What :func:`goodput` found, below each other."""
    lines = [
        f"{'GPUs':>7}{'h between faults':>18}{'interval s':>12}{'goodput':>10}{'closed form':>13}"
        f"{'best interval s':>17}{'goodput':>10}{'Young s':>9}"
    ]
    lines += [
        f"{row['gpus']:>7}{row['hours_between_faults']:>18.1f}{row['interval']:>12.0f}"
        f"{row['goodput']:>10.2%}{row['closed_form']:>13.2%}{row['best_interval']:>17.0f}"
        f"{row['best_goodput']:>10.2%}{row['young']:>9.0f}"
        for row in rows
    ]
    return "\n".join(lines)
