"""Runs stages: finds out which pieces are missing or stale, and has them done.

A run does everything in one call; a share does its part of one stage's pieces beside other processes, on this
or other machines, and looks at no more than it needs for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, replace
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple, cast

from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import Source
from megaregion.curation.settings import CurationSettings, check_settings
from megaregion.curation.stages import JOINED, LOOKING, NAMES, make_stages
from megaregion.curation.stages.stage import (
    Job,
    Manifest,
    Piece,
    Stage,
    Store,
    hash_of,
    recipes_of,
    writable,
)
from megaregion.curation.status import summarise
from megaregion.curation.workers import Task, Workers, folder_held, gpus
from megaregion.errors import UserError
from megaregion.files import read_json, write_bytes
from megaregion.schemas.curation import Summary
from megaregion.settings import read_settings

RUN = "run.json"
"""Below OUT: what a run was started with, so that its state and report need nothing but the folder."""
LIST = "list"
"""The step before all stages: finding the images."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""Opens a progress bar for a stage and a number of images; what it gives is called for each."""


class Share(NamedTuple):
    """Part i of n of a stage's pieces: neighbours, so that a tar is read by few."""

    number: int
    of: int

    def pieces(self, count: int) -> range:
        """Which of so many pieces; every piece is in one share."""
        return range(count * self.number // self.of, count * (self.number + 1) // self.of)


def curate(
    images: Path, out: Path, settings: CurationSettings, bar: Bar, stage: str = "all", workers: int = 2
) -> Summary:
    """Turn a folder of images into a dataset, or do one stage of it; what is done already stays.

    The stage list only finds the images; the outcome does not depend on the number of worker processes.
    Raises UserError where the user can mend something; what is done stays done.
    """
    with folder_held(out), writable(out):
        size = settings.image.piece_images
        source = find_images(images, out / "stages", out, size, workers, settings.annotation)
        record_run(out, images, settings)
        with closing(Pipeline(Job(settings, source, Store(out)), bar, workers)) as pipeline:
            pipeline.run_all(_names(stage))
        return summarise(pipeline.job, pipeline.finished())


def curate_share(
    images: Path, out: Path, settings: CurationSettings, bar: Bar, stage: str, share: Share, workers: int = 2
) -> tuple[range, int]:
    """Do a share of one stage, of images that are listed; other shares may run at the same time, anywhere.

    Gives the share's pieces, and how many of them were done now; the others had been done before. Raises
    UserError where the images are not listed, an earlier stage is not done or a run holds the folder.
    """
    if stage not in (*NAMES, JOINED):
        raise UserError(f"--piece needs --stage with one of {', '.join((*NAMES, JOINED))}, got {stage!r}")
    with folder_held(out, shared=True), writable(out):
        with closing(Pipeline(open_job(images, out, settings), bar, workers, share)) as pipeline:
            pieces, done = pipeline.run_all(LOOKING if stage == JOINED else (stage,))
        if stage == NAMES[-1] and pieces:
            # The last share of all leaves the summary that a run in one call leaves.
            summarise(pipeline.job, pipeline.finished())
        return pieces, done


def open_job(images: Path, out: Path, settings: CurationSettings) -> Job:
    """A run whose images are listed; raises UserError where they are not."""
    return Job(settings, Source(images, out / "stages", settings.image.piece_images), Store(out))


class Pipeline:
    """The stages of one run and the pieces that are done; with a share, it does that part of them only."""

    def __init__(self, job: Job, bar: Bar, workers: int, share: Share | None = None) -> None:
        self.job = job
        self._bar, self._share = bar, share
        self._stages = make_stages(job)
        self._workers = Workers(job, workers)
        # Digests only: a manifest is a kilobyte, and there may be a hundred thousand of them.
        self._done: dict[Piece, str] = {}
        self._recipes: dict[str, tuple[dict[str, str], str]] = {}

    def run_all(self, names: Iterable[str]) -> tuple[range, int]:
        """Run stages in order; gives the share's pieces of the last one, and how many of all were done.

        Neighbours that look at images and whose networks run on cores go through them piece by piece. A GPU
        takes longer than the decoders beside it, and one model at a time leaves more of it to a batch.
        """
        pieces, done = range(0), 0
        for joined, group in groupby(names, self._on_cores):
            for each in [tuple(group)] if joined else zip(group):
                pieces, more = self.run(*each)
                done += more
        return pieces, done

    def _on_cores(self, name: str) -> bool:
        return name in LOOKING and not (self._stages[name].on_gpu() and gpus())

    def run(self, *names: str) -> tuple[range, int]:
        """Do the pieces that are missing or stale of a stage, or of several that look at the same images.

        Gives the share's pieces, and how many were done. Of several, a process does all stages of a piece
        one after the other, and decodes its images once.

        Raises:
            UserError: An earlier stage is not done, or a piece failed.
        """
        stages = [self._stages[name] for name in names]
        pieces = (self._share or Share(0, 1)).pieces(stages[0].pieces())
        lacking = {stages[0]: [n for n in pieces if self._task(stages[0], n)]}
        lacking |= {stage: [n for n in pieces if self._lacks(stage, n)] for stage in stages[1:]}
        if pieces and names[-1] == NAMES[-1]:
            # All that the dataset is made of is done: what a run over more images left is of no more use.
            for each in self._stages.values():
                self.job.store.prune(each.name, each.pieces())
        with ExitStack() as bars:
            ticks = {}
            for stage in reversed([stage for stage in stages if lacking[stage]]):
                stage.prepare()
                images = sum(map(stage.count, lacking[stage]))
                ticks[stage.name] = bars.enter_context(self._bar(stage.name, images))
            numbers = sorted(set(chain.from_iterable(lacking.values())))
            done = self._workers.run([self._chain(stages, n) for n in numbers], ticks) if numbers else 0
        return pieces, done

    def _chain(self, stages: Sequence[Stage], number: int) -> Iterator[Task]:
        """What the stages have to do for a piece; each is asked for when those before it are done."""
        for place, stage in enumerate(stages, 1):
            if task := self._task(stage, number):
                yield task._replace(again=any(self._lacks(later, number) for later in stages[place:]))

    def _lacks(self, stage: Stage, number: int) -> bool:
        return self._digest(Piece(stage.name, number)) is None

    def finished(self) -> Iterator[tuple[str, Iterator[Manifest]]]:
        """Every stage that is completely done, and the manifests of its pieces; files are not hashed."""
        for name, stage in self._stages.items():
            _, wanted = self._recipes_of(name)
            found = self.job.store.glances(name, stage.pieces())
            if all(glance is not None and glance.recipes == wanted for glance in found):
                pieces = (Piece(name, number) for number in range(stage.pieces()))
                yield name, filter(None, (self.job.store.read(piece, thorough=False) for piece in pieces))

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def _task(self, stage: Stage, number: int) -> Task | None:
        """What is to do for a piece that is missing or stale; raises UserError where what it reads is."""
        key = self._key(stage, number)
        if key is None:
            first = next(need for need in stage.needs(number) if self._digest(need, stage) is None)
            raise UserError(
                f"--stage {stage.name} needs piece {first.number} of stage {first.stage}, which is not "
                f"done for these images and settings; run --stage {first.stage} or --stage all first"
            )
        task = Task(Piece(stage.name, number), key, self._recipes_of(stage.name)[0])
        return task if self._lacks(stage, number) else None

    def _digest(self, piece: Piece, reader: Stage | None = None) -> str | None:
        """Digest of a piece that is done and made from what there is now; ``reader`` is who needs it."""
        if piece not in self._done:
            stage = self._stages[piece.stage]
            # A share must not look at everything before it: what one piece made for all is known by its
            # recipes, and a reader of all pieces trusts their sizes.
            recipes, wanted = self._recipes_of(stage.name)
            if self._share is not None and reader is not None and (stage.whole or reader.whole):
                # Nor at what such a piece read: its recipes tell that it is made from what there is now.
                found = self.job.store.glance(piece)
                if found is None or found.recipes != wanted:
                    return None
                self._done[piece] = found.digest
                return found.digest
            manifest = self.job.store.read(piece)
            if manifest is None or manifest.key != self._key(stage, piece.number):
                return None
            if manifest.recipes != recipes:
                # Other settings before it, or other images elsewhere, led to the same input.
                self.job.store.write(piece, replace(manifest, recipes=recipes))
            self._done[piece] = manifest.digest
        return self._done[piece]

    def _recipes_of(self, name: str) -> tuple[dict[str, str], str]:
        """What manifests of a stage have to say, and its hash."""
        if name not in self._recipes:
            recipes = recipes_of(name, self._stages)
            self._recipes[name] = recipes, hash_of(recipes)
        return self._recipes[name]

    def _key(self, stage: Stage, number: int) -> str | None:
        digests = [self._digest(need, stage) for need in stage.needs(number)]
        if any(digest is None for digest in digests):
            return None
        return stage.key(number, [digest for digest in digests if digest is not None])


def _names(stage: str) -> Sequence[str]:
    """What to run: packing without publishing would leave shards that are no dataset."""
    if stage == "all":
        return NAMES
    if stage == LIST:
        return ()
    if stage == JOINED:
        return LOOKING
    if stage not in NAMES:
        raise UserError(f"--stage must be all, {LIST} or one of {', '.join(NAMES)}, got {stage!r}")
    return ("pack", "publish") if stage == "pack" else (stage,)


def job_lines(settings: CurationSettings, joined: bool = False) -> Sequence[str]:
    """A line for each job, in an order in which they can be submitted; joined, those on images are one job.

    Returns:
        ``STAGE many|one EARLIER,EARLIER``: whether pieces can be shared, and the stages to wait for, or
        ``list`` where there is none.
    """
    jobs: dict[str, tuple[str, dict[str, None]]] = {}
    named = {name: JOINED if joined and name in LOOKING else name for name in NAMES}
    # Which stages there are does not depend on the images.
    for name, stage in make_stages(Job(settings, cast("Source", None), Store(Path()))).items():
        if not stage.whole or stage.pieces():
            earlier = [named[other] for other in NAMES if other in (*stage.reads, *stage.reads_whole)]
            kind = "one" if stage.whole and stage.pieces() == 1 else "many"
            others = (other for other in earlier if other != named[name])
            jobs.setdefault(named[name], (kind, {}))[1].update(dict.fromkeys(others))
    return [f"{name} {kind} {','.join(earlier) or LIST}" for name, (kind, earlier) in jobs.items()]


def record_run(out: Path, images: Path, settings: CurationSettings) -> None:
    """Keep what a run was started with."""
    content = {"images": str(images.absolute()), "settings": asdict(settings)}
    write_bytes(out / RUN, json.dumps(content, indent=1).encode())


def recorded_run(out: Path) -> tuple[Path, CurationSettings]:
    """Folder of images and settings of a run; raises UserError where there is none, or of another version."""
    try:
        content = read_json(out / RUN)
        settings = read_settings(CurationSettings(), content["settings"])
        check_settings(settings)
        return Path(content["images"]), settings
    except UserError as error:
        raise UserError(f"{out / RUN}: {error}, or curate again: what is of use is kept") from None
    except OSError:
        raise UserError(f"--out {out} holds no run of tools/curate.py; give the folder of one") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{out / RUN} is damaged; run tools/curate.py --stage list again") from None
