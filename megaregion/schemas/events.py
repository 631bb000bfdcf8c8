"""What happened to a run and when: events.jsonl, one line an event, written by rank 0.

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

EVENTS = "events.jsonl"


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
    records = read_records(run / EVENTS)
    timed = [r for r in records if isinstance(r.get("time"), int | float) and "event" in r]
    return sorted(timed, key=lambda record: record["time"])


def process_start() -> float:
    """When this process was started, in seconds since 1970; now where the system does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        age = 0.0
    return time.time() - age
