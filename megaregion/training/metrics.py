"""What a run says about itself: a log line, metrics.jsonl, and trackers (TensorBoard, W&B, MLflow, trackio).

None of it is worth a run. While a disk is full, records wait in memory and are written once there is room
again. Each tracker is fed by a thread of its own; what it misses is counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, cast

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.files import locked
from megaregion.schemas.evaluation import TRAINED, Table, cells, markdown, scalars
from megaregion.schemas.run import DONE, METRICS
from megaregion.settings import sections

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
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    # What a full disk refuses is lost, without a traceback for each line and each writer of TensorBoard.
    logging.raiseExceptions = False
    threading.excepthook = _tell_of_thread
    file = RankLog(folder / f"rank-{rank:02d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    file.setLevel(logging.INFO)
    LOG.addHandler(file)
    if rank == 0:
        live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and find_spec("rich")
        screen = LiveLine() if live else logging.StreamHandler(sys.stdout)
        screen.setLevel(logging.DEBUG if live else logging.INFO)
        LOG.addHandler(screen)
    return file


class LiveLine(logging.Handler):
    """The log on a terminal: the line of a step stays at the bottom and is drawn over; others go above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        super().__init__()
        self._console, self._line = Console(file=sys.stdout, force_terminal=True, highlight=False), ""
        # It is drawn when it changes, by no thread of its own.
        self._text, self._live = Text, Live(console=self._console, auto_refresh=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, or draw the line that it brings; a debug record is what the run waits for."""
        self._line = getattr(record, "live", self._line)
        if record.levelno == logging.DEBUG:
            self._draw(f"{self._line}  {record.getMessage()} ...")
        elif hasattr(record, "live"):
            self._draw(self._line)
        else:
            style = "yellow" if record.levelno >= logging.WARNING else None
            self._console.print(record.getMessage(), style=style, markup=False, soft_wrap=True)

    def _draw(self, line: str) -> None:
        if not self._live.is_started:
            self._live.start()
            self._console.show_cursor(True)  # A killed process must leave the terminal its cursor.
        self._live.update(self._text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

    def flush(self) -> None:
        """Leave the line where it is."""
        if self._live.is_started:
            self._draw(self._line)
            self._live.stop()


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A traceback, but not of TensorBoard's thread, whose error the next step meets."""
    boards = (failed.thread.__class__.__module__ or "").startswith("tensorboard")
    if not (boards and isinstance(failed.exc_value, OSError)):
        threading.__excepthook__(failed)


class Metrics:
    """One record a logged step; only rank 0 writes."""

    def __init__(self, run: Path, writes: bool, total_steps: int, trackers: Trackers | None = None) -> None:
        """Open the metrics in a run's folder, where this rank writes; the log line names the total steps."""
        self._total, self._run, self._trackers = total_steps, run, trackers if writes else None
        self._waiting: deque[str] = deque(maxlen=KEPT_RECORDS)
        self._file: int | None = None
        self._torn = self._refused = False
        self._passed: deque[tuple[int, float]] = deque(maxlen=100)
        """Last steps and when they were written."""
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
        if self._trackers:
            self._trackers.show(Shown(step, values))
        line = self._fields(step, values)
        # What fits a narrow terminal.
        short = [*line[:2], *line[6:8], self._left(step)]
        LOG.info("  ".join(line), extra={"live": "  ".join(short)})

    def close(self) -> None:
        """Write what waits, and close the file; the trackers may still be shown evaluations."""
        if self._file is not None:
            self._write_waiting()
            os.close(self._file)
            self._file = None
            for handler in LOG.handlers:
                handler.flush()

    def _write_waiting(self) -> None:
        """Append the records that wait, in one write, so that no other process's lines come in between."""
        assert self._file is not None
        text = ("\n" if self._torn else "") + "".join(f"{line}\n" for line in self._waiting)
        content = text.encode()
        try:
            size = os.write(self._file, content)
        except OSError as error:
            if not self._refused:
                LOG.error("%s cannot be written (%s); training goes on", self._run / METRICS, error.strerror)
            self._refused = True
            return
        self._torn = size < len(content)
        if not self._torn:
            self._waiting.clear()
            self._refused = False

    def _fields(self, step: int, values: dict[str, Any]) -> list[str]:
        def number(key: str, form: str, missing: str = "-") -> str:
            value = values.get(key)
            return format(value, form) if value is not None else missing.rjust(6)

        taught = [f"distill {number('loss_distill', '6.3f')}"] if "loss_distill" in values else []
        return [
            f"step {step:>6}/{self._total}", f"loss {number('loss', '7.3f')}",
            f"object {number('loss_object', '7.3f')}", f"text {number('loss_text', '7.3f')}", *taught,
            f"lr {number('lr', '.1e')}", f"norm {number('grad_norm', '6.2f')}",
            f"img/s {number('images_per_second', '6.0f')}", f"mfu {number('mfu', '5.1%')}",
            f"head {number('head_share', '5.1%')}", f"data {number('data_share', '5.1%')}",
            f"bad {values.get('bad', 0)}",
        ]  # fmt: skip

    def _left(self, step: int) -> str:
        """Time to the last step at the pace of the last hundred log lines, saves and all."""
        if self._passed and self._passed[-1][0] >= step:
            self._passed.clear()  # The run went back.
        self._passed.append((step, time.monotonic()))
        (first, then), now = self._passed[0], time.monotonic()
        seconds = (now - then) / max(1, step - first) * (self._total - step)
        return f"{timedelta(seconds=round(seconds))} left" if step > first else ""


# ---- trackers --------------------------------------------------------------------------------------

PAUSE_SECONDS = 60.0
"""Time for which a tracker that failed is left alone."""
CLOSE_SECONDS = 120.0
"""Time that the end of a run waits for trackers; a tenth of it where the run ends early."""


def check_installed(loggers: Iterable[str]) -> None:
    """Raise a UserError for a tracker that is not installed: before a run begins, for later none stops it."""
    for name in loggers:
        module = find_spec(name)
        if module is None or module.origin is None:  # W&B leaves a folder of its name.
            package = "mlflow-skinny" if name == "mlflow" else name
            way_out = f"pip install {package}, or leave it out"
            raise UserError(f"metrics.loggers names {name}, which is not installed: {way_out}")


@dataclass(frozen=True)
class Shown:
    """What there is to show of a step: values, tables of what was measured of its weights, pictures."""

    step: int
    values: Mapping[str, float | None]
    tables: Sequence[Table] = ()
    pictures: Sequence[Path] = ()

    @property
    def numbers(self) -> dict[str, float]:
        """Finite values, and means as evaluation/TABLE/COLUMN, or encoders/OTHER/TABLE/COLUMN."""
        found = {name: v for name, v in self.values.items() if v is not None and math.isfinite(v)}
        for encoder in {encoder for table in self.tables for encoder in table.rows}:
            own = "evaluation" if encoder == TRAINED else f"encoders/{encoder}"
            found |= {f"{own}/{name}": v for name, v in scalars(self.tables, encoder).items()}
        return found

    def entries(self, library: Any) -> dict[str, Any]:
        """All of it as W&B logs it, and trackio, whose interface is W&B's."""
        found: dict[str, Any] = {f"pictures/{file.stem}": library.Image(str(file)) for file in self.pictures}
        for table in self.tables:
            head, *rows = cells(table)
            found[f"tables/{table.key}"] = library.Table(columns=head, data=rows)
        return {**self.numbers, **found}


class Trackers:
    """The trackers of a run, each fed by a thread of its own: no call waits for one but :meth:`close`.

    A run that goes on is the same run there. A step may come twice, after a resume from an earlier one, or
    late, as evaluations do: every value keeps its step, and of two the later belongs to the run's weights.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Note them; each is opened with the first that it is to show."""
        self._feeds = [_Feed(name, config, folder) for name in dict.fromkeys(config.metrics.loggers)]

    def show(self, shown: Shown) -> None:
        """Show what there is of a step."""
        for feed in self._feeds:
            feed.put(shown)

    def close(self, early: bool = False) -> None:
        """Let all end, for a while at most, and say what they missed."""
        feeds, self._feeds = self._feeds, []
        deadline = time.monotonic() + CLOSE_SECONDS / (10 if early else 1)
        for feed in feeds:
            feed.put(None)
        for feed in feeds:
            feed.join(deadline)


Show = Callable[[Shown], object]
Opened = Iterator[tuple[str, Show]]
"""The run's id in a tracker, if it has one there, and what shows a step."""


class _Feed:
    """One tracker, and the thread that shows it what waits."""

    def __init__(self, name: str, config: RunConfig, folder: Path) -> None:
        self._name, self._config, self._folder = name, config, folder
        self._waiting: SimpleQueue[Shown | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._feed, name=name, daemon=True)
        self._asked = self._shown = 0

    def put(self, shown: Shown | None) -> None:
        if shown is not None:
            self._asked += 1
            if self._asked == 1:
                self._thread.start()
            elif self._waiting.qsize() >= KEPT_RECORDS:
                return
        self._waiting.put(shown)

    def join(self, deadline: float) -> None:
        if self._asked:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if missed := self._asked - self._shown:
            LOG.warning("%s missed %d of %d records of this start", self._name, missed, self._asked)

    def _feed(self) -> None:
        again, shown = 0.0, cast("Shown | None", Shown(0, {}))
        while shown is not None:
            try:
                with contextlib.ExitStack() as opened:
                    show = self._open(opened)
                    while (shown := self._waiting.get()) is not None:
                        show(shown)
                        self._shown += 1
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                if not again:
                    LOG.warning("%s fails (%s); the run goes on without it", self._name, reason)
                # After a while it is opened anew.
                again = time.monotonic() + PAUSE_SECONDS
                while shown is not None and (pause := again - time.monotonic()) > 0:
                    with contextlib.suppress(Empty):
                        shown = self._waiting.get(timeout=pause)

    def _open(self, opened: contextlib.ExitStack) -> Show:
        tracker, file = TRACKERS[self._name], self._folder / f"{self._name}.id"
        if tracker is _tensorboard:
            return opened.enter_context(tracker(self._config, self._folder, ""))[1]
        if not opened.enter_context(locked(file, wait=False)):
            raise BlockingIOError("another process shows this run there")
        known = file.read_text().strip()
        own, show = opened.enter_context(tracker(self._config, self._folder, known))
        file.write_text(f"{own}\n")
        LOG.info("%s %s this run as %s", self._name, "goes on with" if known else "shows", own)
        return show


@contextlib.contextmanager
def _tensorboard(config: RunConfig, folder: Path, known: str) -> Opened:
    """tensorboard/ in the run's folder; evaluations below it, each encoder in a folder of its own."""
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard.writer import SummaryWriter

    place, boards = folder / "tensorboard", contextlib.ExitStack()
    trained = place / "evaluation" / TRAINED
    board = cache(lambda path: boards.enter_context(SummaryWriter(str(path))))

    def show(shown: Shown) -> None:
        for name, value in Shown(shown.step, shown.values).numbers.items():
            board(place).add_scalar(name, value, shown.step)
        for encoder in {encoder for table in shown.tables for encoder in table.rows}:
            own = board(place / "evaluation" / encoder.replace("/", "-"))
            for name, value in scalars(shown.tables, encoder).items():
                own.add_scalar(f"evaluation/{name}", value, shown.step)
        for table in shown.tables:
            board(trained).add_text(f"evaluation/{table.key}", markdown([table]), shown.step)
        for file in shown.pictures:
            picture = np.asarray(Image.open(file))
            board(trained).add_image(f"pictures/{file.stem}", picture, shown.step, dataformats="HWC")

    with boards:
        yield "", show


@contextlib.contextmanager
def _wandb(config: RunConfig, folder: Path, known: str) -> Opened:
    """Weights & Biases; with WANDB_MODE=offline in wandb/ of the run's folder, for `wandb sync`."""
    import wandb

    run = wandb.init(
        project=config.metrics.project, name=config.name, id=known or uuid.uuid4().hex[:8], resume="allow",
        dir=str(folder), config=_flat(config), allow_val_change=True,
        # It asks for no key, prints nothing and reads no log; an end without a network is an end.
        settings=wandb.Settings(silent=True, console="off", finish_timeout=CLOSE_SECONDS / 2),
    )  # fmt: skip
    # W&B's own steps only rise, and drop what comes late or again.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    yield run.id, lambda shown: run.log({"step": shown.step, **shown.entries(wandb)})
    run.finish()


@contextlib.contextmanager
def _trackio(config: RunConfig, folder: Path, known: str) -> Opened:
    """The local database of trackio, or the server or Space that its own variables name."""
    import trackio

    # Its runs go by their names.
    run = trackio.init(
        config.metrics.project, known or f"{config.name}-{uuid.uuid4().hex[:6]}", config=_flat(config),
        resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    yield run.name, lambda shown: run.log(shown.entries(trackio), shown.step)
    run.finish()


@contextlib.contextmanager
def _mlflow(config: RunConfig, folder: Path, known: str) -> Opened:
    """MLflow at MLFLOW_TRACKING_URI; without it files in mlruns/ beside the run's folder."""
    # mlflow-skinny has no database, and MLflow wants to be asked for files.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient, entities

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or str(folder.resolve().parent / "mlruns"))
    if not (own := known):
        experiment = client.get_experiment_by_name(config.metrics.project)
        number = experiment.experiment_id if experiment else client.create_experiment(config.metrics.project)
        own = client.create_run(number, run_name=config.name).info.run_id
    client.update_run(own, "RUNNING")
    # A parameter is written once; a setting that a later start changed becomes a tag.
    params = client.get_run(own).data.params
    for key, value in _flat(config).items():
        if key not in params:
            client.log_param(own, key, value)
        elif params[key] != str(value):
            client.set_tag(own, key, value)

    def show(shown: Shown) -> None:
        now, step, numbers = int(time.time() * 1000), shown.step, shown.numbers.items()
        # Names of other letters are refused.
        named = [(re.sub(r"[^\w .:/-]", "_", name), value) for name, value in numbers]
        client.log_batch(own, [entities.Metric(name, value, now, step) for name, value in named])
        if shown.tables:
            client.log_text(own, markdown(shown.tables), f"evaluation/step-{step:08d}.md")
        for file in shown.pictures:
            client.log_artifact(own, str(file), f"pictures/step-{step:08d}")

    yield own, show
    client.set_terminated(own, "FINISHED" if (folder / DONE).exists() else "KILLED")


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def _flat(config: RunConfig) -> dict[str, Any]:
    """Settings by their keys; what is no single value as a text."""
    values = {one.key: one.default for section in sections(config) for one in section.settings}
    return {key: v if isinstance(v, int | float | str) else str(v) for key, v in values.items()}
