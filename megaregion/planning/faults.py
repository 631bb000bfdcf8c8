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

from megaregion.bounds import Positive, PositiveInt, Seconds
from megaregion.schemas.evaluation import aligned

LLAMA3_FAULTS = 419 / (54 * 16_384)
"""Unexpected interruptions per GPU and day."""
DAY = 86_400.0


@dataclass(frozen=True)
class FaultModel:
    """How often a run's machines fail, and what it was measured to lose each time."""

    gpus: PositiveInt = 64
    """GPUs of the run."""
    faults_per_gpu_day: Positive = LLAMA3_FAULTS
    """Faults that end the run, per GPU and day; the default is Llama 3's 419 in 54 days on 16,384 GPUs."""
    save: Seconds = 2.0
    """Seconds that training stands still for a save."""
    write: Seconds = 30.0
    """Seconds from there until the checkpoint is published, beside training."""
    detection: Seconds = 60.0
    """Seconds from a fault until the run has ended."""
    restart: Seconds = 180.0
    """Seconds from there to the next start's first step."""

    @property
    def between_faults(self) -> float:
        """Mean seconds between two faults of any of the GPUs."""
        return DAY / (self.gpus * self.faults_per_gpu_day)


def simulate(model: FaultModel, interval: float, seed: int = 0, faults: int = 100_000) -> float:
    """Share of the wall time in steps that count, over many faults, with a save after so many seconds."""
    gaps = np.random.default_rng(seed).exponential(model.between_faults, faults)
    # From the first step after a restart to the next fault; negative where that came during the restart.
    running = gaps - model.detection - model.restart
    cycles = np.floor((running - model.write) / (interval + model.save))
    return float(np.maximum(cycles, 0).sum() * interval / gaps.sum())


def expected(model: FaultModel, interval: float) -> float:
    """The mean of :func:`simulate` in closed form (Daly's, with the time to publish)."""
    mean = model.between_faults
    idle = model.detection + model.restart + model.write
    return interval * math.exp(-idle / mean) / (mean * math.expm1((interval + model.save) / mean))


def young(model: FaultModel) -> float:
    """Young's first-order best interval, sqrt(2 x save x mean time between faults), in seconds."""
    return math.sqrt(2 * model.save * model.between_faults)


def best_interval(model: FaultModel, seed: int = 0, faults: int = 100_000) -> float:
    """The interval with the greatest simulated goodput, in seconds, on a grid of 2% steps.

    A save is not begun before the one before is published, so no interval is shorter than ``write``.
    """
    center = max(young(model), 1e-3)
    grid = [max(model.write, 1e-3, center * 1.02**power) for power in range(-120, 121)]
    return max(grid, key=lambda interval: (simulate(model, interval, seed, faults), -interval))


def goodput(
    model: FaultModel, interval: float | None, seed: int = 0, faults: int = 100_000
) -> dict[str, float]:
    """Goodput at an interval (the best one if None) and at the best one, by name for :func:`table`."""
    best = best_interval(model, seed, faults)
    chosen = interval or best
    return {
        "gpus": model.gpus,
        "hours_between_faults": model.between_faults / 3600,
        "interval": chosen,
        "goodput": simulate(model, chosen, seed, faults),
        "closed_form": expected(model, chosen),
        "best_interval": best,
        "best_goodput": simulate(model, best, seed, faults),
        "young": young(model),
    }


COLUMNS = (
    ("gpus", "GPUs", ""),
    ("hours_between_faults", "h between faults", ".1f"),
    ("interval", "interval s", ".0f"),
    ("goodput", "goodput", ".2%"),
    ("closed_form", "closed form", ".2%"),
    ("best_interval", "best interval s", ".0f"),
    ("best_goodput", "goodput", ".2%"),
    ("young", "Young s", ".0f"),
)
"""Of the table: name in :func:`goodput`, head, format."""


def table(rows: Sequence[dict[str, float]]) -> str:
    """What :func:`goodput` found, below each other."""
    head = [title for _, title, _ in COLUMNS]
    return aligned([head, *([format(row[name], form) for name, _, form in COLUMNS] for row in rows)], left=())
