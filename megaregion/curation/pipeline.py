"""Runs stages: finds out which pieces are missing or stale, has them done, and says what there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from megaregion.curation.crew import Crew, Task
from megaregion.curation.lock import locked
from megaregion.curation.settings import CurationSettings
from megaregion.curation.source import find_images
from megaregion.curation.stage import Job, Stage
from megaregion.curation.stages import NAMES, make_stages
from megaregion.curation.store import Manifest, Piece, Store
from megaregion.curation.summary import Summary, summarise
from megaregion.errors import UserError

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Opens a progress bar for a stage and a number of images; what it gives is called for each."""


def curate(
    images: Path, out: Path, settings: CurationSettings, bar: Bar, stage: str = "all", workers: int = 2
) -> Summary:
    """Turn a folder of images into a dataset, or do one stage of it; what is done already stays.

    Args:
        images: Folder of images, searched recursively.
        out: Folder of the run; the dataset will be OUT/shards.
        settings: Settings of all stages.
        bar: Shows progress.
        stage: One stage, or all.
        workers: Processes; the outcome does not depend on their number.

    Returns:
        What was found, kept and dropped, as far as stages are done.

    Raises:
        UserError: Something that the user can mend; what is done stays done.
    """
    with locked(out):
        store = Store(out)
        source = find_images(images, out / "stages" / "images.jsonl", out)
        pipeline = Pipeline(Job(settings, source, store), bar, workers)
        try:
            for name in _names(stage):
                pipeline.run(name)
        finally:
            pipeline.close()
        return summarise(pipeline.job, pipeline.finished())


class Pipeline:
    """The stages of one run and the pieces that are done.

    Args:
        job: The run.
        bar: Shows progress.
        workers: Processes.
    """

    def __init__(self, job: Job, bar: Bar, workers: int) -> None:
        self.job = job
        self._bar = bar
        self._stages = make_stages(job)
        self._crew = Crew(job, workers)
        self._done: dict[Piece, Manifest] = {}

    def run(self, name: str) -> None:
        """Do the pieces of a stage that are missing or stale.

        Raises:
            UserError: An earlier stage is not done, or a piece failed.
        """
        stage = self._stages[name]
        tasks = self._missing(stage)
        self.job.store.prune(name, stage.pieces())
        if not tasks:
            return
        stage.prepare()
        for task in tasks:
            self._done.pop(task.piece, None)
        images = sum(max(1, len(stage.images(task.piece.number))) for task in tasks)
        with self._bar(name, images) as tick:
            self._crew.run(tasks, tick)

    def finished(self) -> dict[str, list[Manifest]]:
        """Manifests of every stage that is completely done, by its name."""
        found = {}
        for name, stage in self._stages.items():
            pieces = [self._manifest(Piece(name, number)) for number in range(stage.pieces())]
            manifests = [manifest for manifest in pieces if manifest is not None]
            if len(manifests) == len(pieces):
                found[name] = manifests
        return found

    def close(self) -> None:
        """End the worker processes."""
        self._crew.close()

    def _missing(self, stage: Stage) -> list[Task]:
        tasks = []
        for number in range(stage.pieces()):
            piece = Piece(stage.name, number)
            key = self._key(stage, number)
            if key is None:
                first = next(need for need in stage.needs(number) if self._manifest(need) is None)
                raise UserError(
                    f"--stage {stage.name} needs piece {first.number} of stage {first.stage}, which is not "
                    f"done for these images and settings; run --stage {first.stage} or --stage all first"
                )
            if self._manifest(piece) is None:
                tasks.append(Task(piece, key))
        return tasks

    def _manifest(self, piece: Piece) -> Manifest | None:
        """The manifest of a piece that is done and made from what there is now."""
        if piece not in self._done:
            key = self._key(self._stages[piece.stage], piece.number)
            manifest = None if key is None else self.job.store.read(piece)
            if manifest is None or manifest.key != key:
                return None
            self._done[piece] = manifest
        return self._done[piece]

    def _key(self, stage: Stage, number: int) -> str | None:
        needed: list[Manifest] = []
        for need in stage.needs(number):
            manifest = self._manifest(need)
            if manifest is None:
                return None
            needed.append(manifest)
        return stage.key(number, needed)


def _names(stage: str) -> Sequence[str]:
    """What to run: packing without publishing would leave shards that are no dataset."""
    if stage == "all":
        return NAMES
    if stage not in NAMES:
        raise UserError(f"--stage must be all or one of {', '.join(NAMES)}, got {stage!r}")
    return ("pack", "publish") if stage == "pack" else (stage,)
