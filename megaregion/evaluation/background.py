"""Evaluation beside a run that trains: a process of its own looks at each saved checkpoint.

No rank waits for it. Rank 0 starts the process once a save has begun; the process waits until the
checkpoint is whole, measures its weights on the CPU at the lowest priority, and adds

    runs/NAME/evaluations.jsonl            one line a look: step and means, as TABLE/COLUMN
    runs/NAME/tensorboard/evaluation/      the same as scalars

One look at a time: while one is under way, only the newest later checkpoint is remembered, and looked at
next. A look that fails is named in the log and costs the run nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from megaregion.checkpoint.format import MANIFEST, step_folder
from megaregion.config import RunConfig
from megaregion.errors import USER_ERROR_EXIT, UserError
from megaregion.training.metrics import LOG

RESULTS = "evaluations.jsonl"
MEASURES = ("region", "retrieval", "ocr")
"""What a look measures: what needs one pass over the scenes and no maps."""
PATIENCE = 1800.0
"""Seconds that a look waits for its checkpoint, and that the end of a run waits for the last look."""
KINDNESS = 19
"""Priority of the look: the lowest."""


class BackgroundEvaluation:
    """Rank 0's part: starts looks, one at a time, and says what came of them.

    Args:
        config: The run.

    Raises:
        UserError: evaluate.scenes lacks the gallery or the split.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._folder = Path(config.output) / config.name
        self._child: subprocess.Popen[bytes] | None = None
        self._looked_at = 0
        self._next: int | None = None
        if config.evaluate.every:
            for split in ("train", config.evaluate.split):
                truth = Path(config.evaluate.scenes) / split / "truth.jsonl"
                if not truth.is_file():
                    raise UserError(
                        f"{truth} does not exist, which evaluate.every {config.evaluate.every} needs; name "
                        "another "
                        f"scene set with evaluate.scenes, or make one with tools/make_scenes.py --{split}"
                    )

    def begin(self, step: int) -> None:
        """Look at the checkpoint that a run goes on from, unless that was done before it stopped."""
        if step and step not in recorded_steps(self._folder):
            self.after_save(step)

    def after_save(self, step: int) -> None:
        """Look at this step's checkpoint, now or after the look that is under way; returns at once."""
        every = self._config.evaluate.every
        if every and step % every == 0:
            self._next = step
        self._go_on()

    def finish(self) -> None:
        """Let the looks that were asked for end."""
        deadline = time.monotonic() + PATIENCE
        while self._child is not None or self._next is not None:
            self._go_on()
            if time.monotonic() > deadline:
                LOG.warning("the evaluation of step %d takes too long and is given up", self._looked_at)
                self.stop()
            time.sleep(0.2)

    def stop(self) -> None:
        """End the look that is under way."""
        self._next = None
        if self._child is not None:
            self._child.terminate()
            self._child.wait()
            self._child = None

    def _go_on(self) -> None:
        if self._child is not None and self._child.poll() is not None:
            self._say()
            self._child = None
        if self._child is None and self._next is not None:
            self._looked_at, self._next = self._next, None
            self._child = self._start(self._looked_at)

    def _start(self, step: int) -> subprocess.Popen[bytes]:
        settings = self._config.evaluate
        command = [sys.executable, "-m", "megaregion.evaluation.background", str(self._folder), str(step)]
        # A GPU's memory belongs to training, and the process is no rank of it.
        alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(settings.threads)}
        ours = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        log = self._folder / "logs" / f"evaluation-{step:08d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**ours, **alone},
            )

    def _say(self) -> None:
        assert self._child is not None
        step, found = self._looked_at, recorded_steps(self._folder).get(self._looked_at)
        if self._child.returncode or found is None:
            log = self._folder / "logs" / f"evaluation-{step:08d}.log"
            LOG.warning("the evaluation of step %d failed, see %s", step, log)
            return
        shown = "  ".join(
            f"{name} {found[key]:.1%}"
            for key, name in (("region/knn", "region 5-NN"), ("region/linear", "linear probe"),
                              ("ocr/head_recall", "OCR tokens"))
            if key in found
        )  # fmt: skip
        LOG.info("step %6d was evaluated in %.0f s beside training: %s", step, found["seconds"], shown)


def recorded_steps(folder: Path) -> dict[int, dict[str, float]]:
    """What earlier looks found, by step; of several looks at one step, the last."""
    file = folder / RESULTS
    found: dict[int, dict[str, float]] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            record = json.loads(line)
            found[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue  # The last line of a look that was ended.
    return found


def look(folder: Path, step: int) -> None:
    """Measure one checkpoint of a run and record it.

    Args:
        folder: The run's folder.
        step: Step of a checkpoint that is, or is being, saved.

    Raises:
        UserError: The checkpoint never came, or scenes and dataset cannot be used.
    """
    from megaregion.evaluation.network import open_run
    from megaregion.evaluation.study import StudyConfig, evaluate
    from megaregion.schemas.evaluation import scalars, write_board

    _wait_for(step_folder(folder / "checkpoints", step) / MANIFEST)
    began = time.monotonic()
    run = open_run(folder, step)
    settings = run.config.evaluate
    study = evaluate(
        run,
        StudyConfig(
            scenes=Path(settings.scenes),
            dataset=Path(run.config.data.path),
            split=settings.split,
            limit=settings.limit,
            measures=MEASURES,
            baselines=False,
        ),
    )
    record = {"step": step, "time": time.time(), "seconds": round(time.monotonic() - began, 2)}
    record |= {name: round(value, 5) for name, value in scalars(study.tables, "trained").items()}
    with (folder / RESULTS).open("a") as file:
        file.write(json.dumps(record) + "\n")
    write_board(folder / "tensorboard", step, study.tables)


def _wait_for(manifest: Path) -> None:
    parent, deadline = os.getppid(), time.monotonic() + PATIENCE
    while not manifest.exists():
        if os.getppid() != parent or time.monotonic() > deadline:
            raise UserError(f"{manifest} never came: the save failed, or the run ended before it")
        time.sleep(0.5)


if __name__ == "__main__":
    os.nice(KINDNESS)
    try:
        look(Path(sys.argv[1]), int(sys.argv[2]))
    except UserError as error:
        print(f"megaregion: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT)
