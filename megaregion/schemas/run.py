"""What a run writes of itself, a line of JSON each, and what its wall time went into, which the lines say.

They are read leniently, for the run may be writing yet:

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
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megaregion.errors import UserError
from megaregion.files import read_records
from megaregion.schemas.evaluation import aligned

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


def evaluation_file(run: Path, step: int) -> Path:
    """Where an evaluation beside training leaves its tables, as an evaluation.json."""
    return run / "evaluations" / f"step-{step:08d}.json"


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


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall time of all starts by what they were spent on, from the first start to the last sign.

    start ........ ready ......... killed          start ...... ready ............. end
    |  starting    | training, saving | restarting | starting   | training, saving  |
                          ^ steps after the checkpoint that the next start resumed from are lost
    """

    training: float
    """Steps that count."""
    saving: float
    """Training stood still for a save."""
    starting: float
    """From the start of the process to its first step: imports, connections, loading the checkpoint."""
    restarting: float
    """Between the last sign of one start and the beginning of the next."""
    lost: float
    """Steps that were taken again."""
    starts: int
    """Times that the run was started."""

    @property
    def total(self) -> float:
        """Wall time in seconds."""
        return float(sum(getattr(self, name) for name in SPENT))

    def shares(self) -> dict[str, float]:
        """Share of the wall time by name; training's is the goodput."""
        return {name: getattr(self, name) / self.total if self.total else 0.0 for name in SPENT}

    def table(self) -> str:
        """Aligned text: one line a share."""
        shares = {**self.shares(), "total": 1.0}
        rows = [(name, f"{share * self.total / 3600:.3f}", f"{share:.2%}") for name, share in shares.items()]
        return f"{aligned([('', 'hours', 'share'), *rows])}\n{self.starts} starts"


SPENT = tuple(part.name for part in fields(Goodput) if part.name != "starts")


@dataclass
class _Step:
    """One record of metrics.jsonl: the steps since the record before it.

    Its time is the time since that record (or since ready), without what a save took away.
    """

    first: int
    """Step before the first that the record covers."""
    step: int
    seconds: float
    kept: float = 1.0
    """Share of its steps that the run did not take again, after a restart or a roll-back."""


@dataclass
class _Start:
    """What one start of the run left behind; times in seconds since 1970."""

    began: float
    last: float
    ready: float | None = None
    blocked: float = 0.0
    """Seconds that saves held training."""
    steps: list[_Step] = field(default_factory=list)


def measure(run: Path) -> Goodput:
    """Read a run's files and split its wall time.

    Raises:
        UserError: The run has no events.
    """
    events = read_events(run)
    if not any(event["event"] == "start" for event in events):
        raise UserError(f"{run / EVENTS} holds no start; give the folder of a run that has trained")
    return split(events, step_times(run))


def split(events: Iterable[dict[str, Any]], metrics: Iterable[dict[str, Any]]) -> Goodput:
    """Split the wall time of all starts by the records of events.jsonl, in order, and of metrics.jsonl."""
    line = [*((e["time"], e) for e in events), *((m["time"], m) for m in metrics)]
    starts: list[_Start] = []
    previous, before, taken = 0, 0.0, 0.0
    for now, record in sorted(line, key=lambda item: item[0]):
        kind = record.get("event")
        if kind == "start":
            starts.append(_Start(now, last=now))
            continue
        if not starts:
            continue
        start = starts[-1]
        start.last = now
        if kind in ("resumed", "ready"):
            _go_back(starts, record["step"])
            previous, before = record["step"], now
            if kind == "ready":
                start.ready = now
        elif kind == "blocked":
            start.blocked += record["seconds"]
            taken += record["seconds"]
        elif kind is None:
            start.steps.append(_Step(previous, record["step"], max(0.0, now - before - taken)))
            previous, before, taken = record["step"], now, 0.0
    return _sum(starts)


def _go_back(starts: list[_Start], step: int) -> None:
    """Everything after this step will be taken again."""
    for record in (record for start in starts for record in start.steps if record.step > step):
        covered = max(1, record.step - record.first)
        record.kept = min(record.kept, max(0, step - record.first) / covered)


def _sum(starts: list[_Start]) -> Goodput:
    spent = dict.fromkeys(SPENT, 0.0)
    for start, following in zip(starts, [*starts[1:], None], strict=True):
        ready = start.last if start.ready is None else start.ready
        lost = sum(record.seconds * (1 - record.kept) for record in start.steps)
        spent["starting"] += ready - start.began
        spent["saving"] += start.blocked
        spent["lost"] += lost
        spent["training"] += max(0.0, start.last - ready - start.blocked - lost)
        if following is not None:
            spent["restarting"] += max(0.0, following.began - start.last)
    return Goodput(**spent, starts=len(starts))


class Meter:
    """The shares while the run goes on, without reading the files again."""

    def __init__(self, run: Path) -> None:
        """Read what earlier starts and this one's beginning left; call it when training begins."""
        try:
            self._past = measure(run)
        except (UserError, OSError):
            self._past = Goodput(0.0, 0.0, 0.0, 0.0, 0.0, 0)  # A full disk swallowed the events.
        self._began = time.time()
        self._saving = 0.0

    def blocked(self, seconds: float) -> None:
        """Count time that a save took from training."""
        self._saving += seconds

    def shares(self) -> dict[str, float]:
        """Shares up to now, by name, as :meth:`Goodput.shares` gives them."""
        past, training = self._past, max(0.0, time.time() - self._began - self._saving)
        return replace(past, training=past.training + training, saving=past.saving + self._saving).shares()
