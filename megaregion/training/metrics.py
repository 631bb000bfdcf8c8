"""What a run says about itself: a log line, metrics.jsonl and TensorBoard, written by rank 0.

None of it is worth a run. While a disk is full, records wait in memory and are written once there is room
again; TensorBoard, which keeps nothing, misses those steps.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from megaregion.schemas.run import METRICS

LOG = logging.getLogger("megaregion")

KEPT_RECORDS = 100_000
"""Records that wait for room on the disk; beyond them the oldest are lost."""


def open_log(folder: Path, rank: int) -> None:
    """Send this rank's log to logs/rank-NN.log, and rank 0's to the terminal as well."""
    folder.mkdir(parents=True, exist_ok=True)
    LOG.handlers.clear()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.raiseExceptions = False  # A line that a full disk refuses is lost, without a traceback for each.
    file = logging.FileHandler(folder / f"rank-{rank:02d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.addHandler(file)
    if rank == 0:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(logging.Formatter("%(message)s"))
        LOG.addHandler(screen)


class Metrics:
    """One record a logged step; only rank 0 writes."""

    def __init__(self, run: Path, writes: bool, total_steps: int) -> None:
        """Open the metrics in a run's folder, where this rank writes; the log line names the total steps."""
        self._total, self._run = total_steps, run
        self._waiting: deque[str] = deque(maxlen=KEPT_RECORDS)
        self._file: int | None = None
        self._board: Any = None
        self._torn = self._refused = False
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
            self._refuse(error)
            return
        self._torn = written < len(content)
        if not self._torn:
            self._waiting.clear()
            self._refused = False

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
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        if not self._refused:
            LOG.error("metrics of %s cannot be written (%s); training goes on", self._run, error.strerror)
        self._refused = True

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
