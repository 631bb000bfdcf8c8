"""What a run says about itself: a log line, metrics.jsonl and TensorBoard, written by rank 0."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

LOG = logging.getLogger("megaregion")


def open_log(folder: Path, rank: int) -> None:
    """Send this rank's log to logs/rank-NN.log, and rank 0's to the terminal as well."""
    folder.mkdir(parents=True, exist_ok=True)
    LOG.handlers.clear()
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
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
        """Open the run's metrics.

        Args:
            run: Folder of the run.
            writes: Whether this rank writes.
            total_steps: Steps of the whole run, for the log line.
        """
        self._total = total_steps
        self._file = None
        self._board: Any = None
        if writes:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._file = (run / "metrics.jsonl").open("a")
            self._board = SummaryWriter(str(run / "tensorboard"))

    def write(
        self, step: int, values: dict[str, float | int | None], notes: dict[str, Any] | None = None
    ) -> None:
        """Write one step's values.

        Args:
            step: Steps taken, this one included.
            values: Numbers by name; None where a step has no such value.
            notes: What is no number; only metrics.jsonl keeps it.
        """
        if self._file is None:
            return
        record = {"step": step, "time": time.time(), **values, **(notes or {})}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._board.add_scalar(name, value, step)
        LOG.info(self._line(step, values))

    def shares(self, step: int, shares: dict[str, float]) -> None:
        """Show in TensorBoard what the wall time of all starts went into."""
        if self._board is not None:
            for name, share in shares.items():
                self._board.add_scalar(f"time/{name}", share, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        def number(key: str, form: str, missing: str = "-") -> str:
            value = values.get(key)
            return format(value, form) if value is not None else missing.rjust(6)

        return (
            f"step {step:>6}/{self._total}  loss {number('loss', '7.3f')}  "
            f"object {number('loss_object', '7.3f')}  text {number('loss_text', '7.3f')}  "
            f"lr {number('lr', '.1e')}  norm {number('grad_norm', '6.2f')}  "
            f"img/s {number('images_per_second', '6.0f')}  head {number('head_share', '5.1%')}  "
            f"data {number('data_share', '5.1%')}  bad {values.get('bad', 0)}"
        )
