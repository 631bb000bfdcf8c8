"""What a run writes of itself while it goes, a line of JSON each; read leniently, for it may be writing yet.

metrics.jsonl of training, evaluations.jsonl of evaluation/background.py, and events.jsonl of rank 0:

    {"step": 120, "time": 1764000000.1, "loss": 6.2, "loss_object": 4.1, "loss_text": null, "lr": 3e-4,
     "grad_norm": 0.9, "images_per_second": 512.0, "mfu": 0.47, "head_share": 0.01, "data_share": 0.0,
     "bad": 0, "skipped": 0, "rollbacks": 0, "memory": 61.2, "time/data": 0.0, ..., "object/...": ...,
     "time_by_rank": [{"data": 0.0, ...}, ...], "slowest": {"data": 3, ...}, "slow": [{"rank": 3, ...}]}

    {"step": 120, "time": 1764000000.1, "seconds": 31.5, "region/knn": 0.61, ...}

    {"time": 1764000000.1, "event": "start", "incarnation": 2, "token": "4711.1", "ranks": 64, "hosts": [...]}
    {"time": ..., "event": "resumed", "step": 1200}      {"time": ..., "event": "ready", "step": 1200}
    {"time": ..., "event": "resumed", "step": 1200, "changed": {"optimizer.lr": [0.001, 0.0005]}}    old, new
    {"time": ..., "event": "blocked", "step": 1300, "seconds": 0.4}    training waited for a save
    {"time": ..., "event": "saved", "step": 1300, "seconds": 21.0}     the save in full, beside training
    {"time": ..., "event": "stop", "step": 1350, "reason": "SIGUSR1"}  {"time": ..., "event": "end", ...}
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from megaregion.files import read_records

METRICS = "metrics.jsonl"
GUARD = "guard.jsonl"
LOG = "logs/rank-00.log"
"""Rank 0's log; other ranks have their own number."""
DONE = "DONE"
"""Lies in the run's folder once the last step is taken: jobs that were chained to it leave at once."""
HUGE = 10**300
"""Beyond any measured number."""
EVALUATIONS = "evaluations.jsonl"
EVENTS = "events.jsonl"


def read_evaluations(run: Path) -> dict[int, dict[str, Any]]:
    """What evaluations beside training found, by step; of several of one step, the last."""
    records = read_records(run / EVALUATIONS)
    return {record["step"]: record for record in records if isinstance(record.get("step"), int)}


def step_times(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that say when which step was logged, in their order."""
    return _timed(run / METRICS, "step")


class Events:
    """Appends to a run's events; nothing is written where ``writes`` is False."""

    def __init__(self, run: Path, writes: bool) -> None:
        self._file = run / EVENTS if writes else None

    def write(self, event: str, at: float | None = None, **facts: object) -> None:
        """Append one event.

        Args:
            event: What happened.
            at: When, in seconds since 1970; now if None.
            facts: Further entries.
        """
        if self._file is None:
            return
        line = json.dumps({"time": time.time() if at is None else at, "event": event, **facts})
        # One write to a file in append mode: threads and an orphan's process never mix their lines. An event
        # is never worth a run: a full disk loses it.
        try:
            with self._file.open("a") as stream:
                stream.write(line + "\n")
        except OSError:
            pass


def read_events(run: Path) -> list[dict[str, Any]]:
    """A run's events in the order of time; none if it has no such file."""
    return sorted(_timed(run / EVENTS, "event"), key=lambda record: record["time"])


def _timed(path: Path, key: str) -> list[dict[str, Any]]:
    return [r for r in read_records(path) if isinstance(r.get("time"), int | float) and key in r]


def process_start() -> float:
    """When this process was started, in seconds since 1970; now where the system does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age
