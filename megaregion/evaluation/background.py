"""One saved checkpoint evaluated beside the run that trains; training starts it as a command.

    python -m megaregion.evaluation.background RUN STEP

waits until the checkpoint is whole, measures its weights on the CPU at the lowest priority, and adds

    RUN/evaluations.jsonl               one line an evaluation: step and means, as TABLE/COLUMN
    RUN/evaluations/step-00000040.json  its tables, as an evaluation.json

which training shows in the run's trackers, for one process alone may write to those.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from megaregion.checkpoint.format import MANIFEST, step_folder
from megaregion.errors import USER_ERROR_EXIT, UserError
from megaregion.schemas.run import EVALUATIONS, evaluation_file

WATCHED = ("region", "retrieval", "ocr")
"""What is measured: what needs one pass over the scenes and no maps."""
WAIT_SECONDS = 1800.0
"""Time that the checkpoint is given to become whole."""
KINDNESS = 19
"""Priority of the process: the lowest."""


def evaluate_step(folder: Path, step: int) -> None:
    """Measure one checkpoint of a run, which is, or is being, saved, and record it.

    Raises:
        UserError: The checkpoint never came, or scenes and dataset cannot be used.
    """
    _wait_for(step_folder(folder / "checkpoints", step) / MANIFEST)
    # At the lowest priority by now, and not in the way of the first steps of the run.
    from megaregion.evaluation.network import open_run
    from megaregion.evaluation.study import StudyConfig, evaluate
    from megaregion.schemas.evaluation import TRAINED, scalars, write_evaluation

    began = time.monotonic()
    run = open_run(folder, step)
    wanted = run.config.evaluate
    config = StudyConfig(
        Path(wanted.scenes), split=wanted.split, limit=wanted.limit, measures=WATCHED, baselines=False
    )
    study = evaluate(run, config)
    record = {"step": step, "time": time.time(), "seconds": round(time.monotonic() - began, 2)}
    record |= {name: round(value, 5) for name, value in scalars(study.tables, TRAINED).items()}
    tables = evaluation_file(folder, step)
    tables.parent.mkdir(exist_ok=True)
    write_evaluation(tables, study.evaluation())
    with (folder / EVALUATIONS).open("a") as file:
        file.write(json.dumps(record) + "\n")


def _wait_for(manifest: Path) -> None:
    parent, deadline = os.getppid(), time.monotonic() + WAIT_SECONDS
    while not manifest.exists():
        if os.getppid() != parent or time.monotonic() > deadline:
            raise UserError(f"{manifest} never came: the save failed, or the run ended before it")
        time.sleep(0.5)


if __name__ == "__main__":
    os.nice(KINDNESS)
    try:
        evaluate_step(Path(sys.argv[1]), int(sys.argv[2]))
    except UserError as error:
        print(f"megaregion: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT)
