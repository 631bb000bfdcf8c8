"""Evaluation beside training: rank 0 starts a process for saved checkpoints, and no rank waits for it.

It is started as a command, so that training knows nothing of how a network is evaluated.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.schemas.evaluation import SUMMARY, read_evaluation
from megaregion.schemas.run import evaluation_file, read_evaluations
from megaregion.training.metrics import LOG, Shown, Trackers

COMMAND = "megaregion.evaluation.background"
"""The module that evaluates; takes the run's folder and a step."""
LAST_SECONDS = 1800.0
"""Time that the end of a run waits for the last evaluation."""
PRIORITY = 19
"""The lowest of a process."""
SHOWN = {"region/knn": "region 5-NN", "region/linear": "linear probe", "ocr/head_recall": "OCR tokens"}
"""Results in the log line, and what they are called there."""


class BackgroundEvaluation:
    """Starts evaluations, one at a time, and says what came of them; one that fails costs the run nothing.

    While one is under way, only the newest later checkpoint is remembered, and evaluated next.

    Raises:
        UserError: evaluate.scenes lacks the gallery or the split.
    """

    def __init__(self, config: RunConfig) -> None:
        self._settings = config.evaluate
        self._folder = Path(config.output) / config.name
        self._trackers: Trackers | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0
        self._next: int | None = None
        for split in ("train", self._settings.split) if self._settings.every else ():
            truth = Path(self._settings.scenes) / split / "truth.jsonl"
            if not truth.is_file():
                raise UserError(
                    f"{truth} does not exist, which evaluate.every {self._settings.every} needs; name "
                    f"another scene set with evaluate.scenes, or make one with tools/make_scenes.py --{split}"
                )

    def begin(self, step: int, trackers: Trackers) -> None:
        """Evaluate the checkpoint that a run goes on from, unless that was done before it stopped.

        What evaluations find is shown in the trackers.
        """
        self._trackers = trackers
        if step and step not in read_evaluations(self._folder):
            self.after_save(step)

    def after_save(self, step: int) -> None:
        """Evaluate this step's checkpoint, now or after the one that is under way; returns at once."""
        if self._settings.every and step % self._settings.every == 0:
            self._next = step
        self._go_on()

    def finish(self) -> None:
        """Let the evaluations that were asked for end."""
        deadline = time.monotonic() + LAST_SECONDS
        if self._process is not None:
            LOG.debug("evaluating")
        while self._process is not None or self._next is not None:
            self._go_on()
            if time.monotonic() > deadline:
                LOG.warning("the evaluation of step %d takes too long and is given up", self._step)
                self.stop()
            time.sleep(0.2)

    def stop(self) -> None:
        """End the evaluation that is under way."""
        self._next = None
        self._go_on()
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _go_on(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._tell(self._process.returncode)
            self._process = None
        if self._process is None and self._next is not None:
            self._step, self._next = self._next, None
            self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # It is no rank of the run.
        ranked = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        ours = {key: text for key, text in os.environ.items() if key not in ranked}
        # A GPU's memory belongs to training.
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(self._settings.threads)}
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", COMMAND, str(self._folder), str(self._step)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env={**ours, **alone},
            )  # fmt: skip
        # It runs on rank 0's cores, and takes what that and its loader leave.
        os.setpriority(os.PRIO_PROCESS, process.pid, PRIORITY)
        return process

    def _tell(self, code: int) -> None:
        found = read_evaluations(self._folder).get(self._step)
        if code or found is None:
            LOG.warning("the evaluation of step %d failed, see %s", self._step, self._log)
            return
        if self._trackers:
            tables = read_evaluation(evaluation_file(self._folder, self._step)).tables
            self._trackers.show(Shown(self._step, {}, [own for own in tables if own.key != SUMMARY]))
        shown = "  ".join(f"{name} {found[key]:.1%}" for key, name in SHOWN.items() if key in found)
        LOG.info("step %6d was evaluated in %.0f s beside training: %s", self._step, found["seconds"], shown)

    @property
    def _log(self) -> Path:
        return self._folder / "logs" / f"evaluation-{self._step:08d}.log"
