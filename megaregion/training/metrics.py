"""What a run says about itself: a log line, metrics.jsonl and TensorBoard, and what its wall time went into.

None of it is worth a run. While a disk is full, records wait in memory and are written once there is room
again; TensorBoard, which keeps nothing, misses those steps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megaregion.errors import UserError
from megaregion.schemas.run import EVENTS, METRICS, read_events, step_times
from megaregion.tables import aligned

LOG = logging.getLogger("megaregion")

KEPT_RECORDS = 100_000
"""Records that wait for room on the disk; beyond them the oldest are lost."""


class RankLog(logging.FileHandler):
    """The file of one rank's log."""

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, not path.exists()
        super().__init__(path)

    def forget(self) -> None:
        """Remove it if this start has begun it, and its run's folder if nothing else is there."""
        with contextlib.suppress(OSError):
            if self._begun:
                self._path.unlink()
                self._path.parent.rmdir()
                self._path.parents[1].rmdir()


def open_log(folder: Path, rank: int) -> RankLog:
    """Send this rank's log to logs/rank-NN.log, which is returned, and rank 0's to the terminal as well."""
    folder.mkdir(parents=True, exist_ok=True)
    LOG.handlers.clear()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    # What a full disk refuses is lost, without a traceback for each line and each writer of TensorBoard.
    logging.raiseExceptions = False
    threading.excepthook = _tell_of_thread
    file = RankLog(folder / f"rank-{rank:02d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(file)
    if rank == 0:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        LOG.addHandler(screen)
    return file


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A traceback, but not of TensorBoard's thread, whose error the next step meets."""
    boards = (failed.thread.__class__.__module__ or "").startswith("tensorboard")
    if not (boards and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


class Metrics:
    """One record a logged step; only rank 0 writes."""

    def __init__(self, run: Path, writes: bool, total_steps: int) -> None:
        """Open the metrics in a run's folder, where this rank writes; the log line names the total steps."""
        self._total, self._run = total_steps, run
        self._waiting: deque[str] = deque(maxlen=KEPT_RECORDS)
        self._file: int | None = None
        self._board: Any = None
        self._torn = False
        self._missing: set[str] = set()
        """What cannot be written now, and was said to be."""
        if writes:
            self._file = os.open(run / METRICS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(
        self, step: int, values: dict[str, float | int | None], notes: dict[str, Any] | None = None
    ) -> None:
        """Write a step's values, None where it has none; notes are no numbers, for metrics.jsonl alone."""
        if self._file is None:
            return
        record = {"step": step, "time": time.time(), **values, **(notes or {})}
        self._waiting.append(json.dumps(record))
        self._write_waiting()
        self._show({n: v for n, v in values.items() if v is not None and math.isfinite(v)}, step)
        LOG.info(self._line(step, values))

    def shares(self, step: int, shares: dict[str, float]) -> None:
        """Show in TensorBoard what the wall time of all starts went into."""
        if self._file is not None:
            self._show({f"time/{name}": share for name, share in shares.items()}, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is None:
            return
        self._write_waiting()
        os.close(self._file)
        self._file = None
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                LOG.warning("TensorBoard's last steps could not be written: %s", error)

    def _write_waiting(self) -> None:
        """Append the records that wait, in one write, so that no other process's lines come in between."""
        assert self._file is not None
        text = ("\n" if self._torn else "") + "".join(f"{line}\n" for line in self._waiting)
        content = text.encode()
        try:
            written = os.write(self._file, content)
        except OSError as error:
            self._refuse(METRICS, error)
            return
        self._torn = written < len(content)
        if not self._torn:
            self._waiting.clear()
            self._missing.discard(METRICS)

    def _show(self, values: dict[str, float], step: int) -> None:
        try:
            if self._board is None:
                from torch.utils.tensorboard.writer import SummaryWriter

                self._board = SummaryWriter(str(self._run / "tensorboard"))
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            # Its writing thread has ended; the next step opens another.
            self._board = None
            self._refuse("tensorboard", error)

    def _refuse(self, what: str, error: OSError) -> None:
        if what not in self._missing:
            LOG.error("%s cannot be written (%s); training goes on", self._run / what, error.strerror)
        self._missing.add(what)

    def _line(self, step: int, values: dict[str, Any]) -> str:
        def number(key: str, form: str, missing: str = "-") -> str:
            value = values.get(key)
            return format(value, form) if value is not None else missing.rjust(6)

        return (
            f"step {step:>6}/{self._total}  loss {number('loss', '7.3f')}  "
            f"object {number('loss_object', '7.3f')}  text {number('loss_text', '7.3f')}  "
            f"lr {number('lr', '.1e')}  norm {number('grad_norm', '6.2f')}  "
            f"img/s {number('images_per_second', '6.0f')}  mfu {number('mfu', '5.1%')}  "
            f"head {number('head_share', '5.1%')}  data {number('data_share', '5.1%')}  "
            f"bad {values.get('bad', 0)}"
        )


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
