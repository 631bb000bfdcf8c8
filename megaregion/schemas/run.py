"""What a run writes of itself while it goes, a line of JSON each; read leniently, for it may be writing yet.

metrics.jsonl of training, evaluations.jsonl of evaluation/background.py, and events.jsonl of rank 0:

    {"step": 120, "time": 1764000000.1, "loss": 6.2, "loss_object": 4.1, "loss_text": null, "lr": 3e-4,
     "grad_norm": 0.9, "images_per_second": 512.0, "mfu": 0.47, "head_share": 0.01, "data_share": 0.0,
     "bad": 0, "skipped": 0, "rollbacks": 0, "time/data": 0.0, ..., "object/...": ...,
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaregion.errors import UserError
from megaregion.files import parse_json, read_records

METRICS = "metrics.jsonl"
HUGE = 10**300
"""Beyond any measured number."""
EVALUATIONS = "evaluations.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return len(self.steps) > 0


class Metrics:
    """All metrics of a run, by name.

    After a resume the same step may stand twice in the file; the later line counts, for it belongs to
    the weights that the run ended with.
    """

    def __init__(self, lines: dict[int, dict[str, float]]) -> None:
        self._lines = lines

    def curve(self, name: str) -> Curve:
        """The metric of this name; an empty curve when it was never logged."""
        points = [(step, line[name]) for step, line in sorted(self._lines.items()) if name in line]
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max(self._lines)

    @property
    def duration(self) -> float | None:
        """Seconds between the first and the last logged step; None without times."""
        times = self.curve("time").values
        return max(times) - min(times) if len(times) > 1 else None


def read_metrics(path: Path) -> Metrics:
    """Read a run's metrics; missing keys, nulls and values that are no finite number are left out.

    Raises:
        UserError: The file is missing, holds no step, or a line other than the last is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; tools/pretrain.py writes it while it trains")
    lines: dict[int, dict[str, float]] = {}
    texts = [text for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            step = int(line["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            # A run that is writing, or was killed while it wrote, leaves half a last line.
            if number == len(texts):
                break
            raise UserError(f"{path} line {number} is not a step's metrics; remove that line") from None
        lines[step] = {name: float(value) for name, value in line.items() if _is_finite(value)}
    if not lines:
        raise UserError(f"{path} holds no step; let the run log at least one")
    return Metrics(lines)


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


def _is_finite(value: object) -> bool:
    # A whole number may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and -HUGE < value < HUGE
