"""Saving while training goes on: a copy in host memory, one writing thread a rank, agreement by files."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.checkpoint.fence import Fence, refusal
from megaregion.checkpoint.format import (
    MANIFEST,
    UNFINISHED,
    Piece,
    finished_folders,
    publish,
    rank_file,
    step_folder,
    step_folders,
    step_of,
    unfinished_folder,
    write_pieces,
)
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megaregion.errors import Fenced
from megaregion.files import read_json
from megaregion.parallel.topology import Topology
from megaregion.schemas.run import Events

LOG = logging.getLogger("megaregion")

OTHERS_SECONDS = 900.0
"""Seconds that rank 0 waits for the other ranks' files before it gives a save up."""


class Outcome(IntEnum):
    """How a save ended; the worst of all ranks counts."""

    SAVED = 0
    FAILED = 1
    FENCED = 2


class Snapshot:
    """Copies of pieces in host memory that is used again at every save, pinned where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def take(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Copy pieces; what an earlier call gave is overwritten."""
        taken, on_gpu = [], self._device.type == "cuda"
        for piece in pieces:
            key, tensor = (piece.name, piece.offset), piece.tensor.detach()
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = tensor.new_empty(tensor.shape, device="cpu", pin_memory=on_gpu)
                self._buffers[key] = buffer
            buffer.copy_(tensor, non_blocking=True)
            taken.append(replace(piece, tensor=buffer))
        if on_gpu:
            torch.cuda.synchronize(self._device)
        return taken


@dataclass(frozen=True)
class Retention:
    """Which checkpoints a run keeps: those that any part of the rule wants."""

    last: int
    """Newest checkpoints that stay."""
    every: int = 0
    """Steps that are multiples of this stay for ever; 0 for none."""
    best: int = 0
    """Checkpoints with the lowest mean loss that stay; 0 for none."""

    def kept(self, losses: dict[int, float | None], newest: Collection[int]) -> set[int]:
        """Steps that stay, of all with their mean losses (None: unknown) and the newest that can be read."""
        known = [(loss, -step) for step, loss in losses.items() if loss is not None]
        every = {step for step in losses if self.every and step % self.every == 0}
        return {*newest} | every | {-step for _, step in sorted(known)[: self.best]}


@dataclass(frozen=True)
class Save:
    """One save under way."""

    checkpoints: Path
    step: int
    pieces: list[Piece]
    """This rank's share, in host memory that nobody changes until the save has ended."""
    facts: dict[str, Any]
    """Entries for the manifest; rank 0 needs them."""


class Saver:
    """Writes saves one at a time, each in a thread of its own."""

    def __init__(
        self,
        topology: Topology,
        fence: Fence,
        events: Events,
        retention: Retention,
        staging: Path | None = None,
        others_seconds: float = OTHERS_SECONDS,
    ) -> None:
        """Make a saver without a save under way.

        Writes go by way of ``staging``, the run's folder on this host's own disk, unless that is None; rank 0
        waits some seconds for the other ranks' files.
        """
        self._topology, self._fence = topology, fence
        self._events, self._retention = events, retention
        self._staging = staging / f"rank-{topology.rank:05d}" if staging is not None else None
        self._others_seconds = others_seconds
        self._thread: threading.Thread | None = None
        self._outcome = Outcome.SAVED
        self._fenced: Fenced | None = None
        self._step = 0
        self.saved: int | None = None
        """Step of the last checkpoint that is known to be complete and visible."""
        self.reason = ""
        """Why the last save failed, as far as this rank knows."""
        self.whole: set[Path] = set()
        """Checkpoints that this run has written or read and found whole."""

    def prepare(self, checkpoints: Path, step: int) -> bool:
        """Make the folder of a save; whether every rank has it; a collective, in the main thread.

        Raises:
            Fenced: A newer incarnation owns the run.
        """

        def make() -> None:
            if self._topology.rank == 0:
                self._fence.check()
                unfinished = unfinished_folder(checkpoints, step, self._fence.number)
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True, exist_ok=True)

        return self._agree(self._attempt(make))

    def start(self, save: Save) -> None:
        """Begin to write; every rank calls it after :meth:`prepare`, and :meth:`wait` before the next one."""
        self._step = save.step
        thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        # It fails where memory or threads are used up; nothing must wait for it then.
        thread.start()
        self._thread = thread

    def wait(self) -> bool:
        """Wait for the save under way; whether it is complete and visible; a collective, in the main thread.

        Raises:
            Fenced: A newer incarnation owns the run; raised on every rank.
        """
        if self._thread is None:
            return True
        self._thread.join()
        self._thread = None
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        saved = self._agree(self._outcome)
        if saved:
            self.saved = self._step
        return saved

    def done(self) -> bool:
        """Whether this rank's thread has ended, or there is none; no collective."""
        return self._thread is None or not self._thread.is_alive()

    def settle(self, seconds: float) -> None:
        """Give this rank's thread some time when the run ends by an error; no collective."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, save: Save) -> None:
        began = time.perf_counter()
        self._outcome = self._attempt(lambda: self._save(save))
        final = step_folder(save.checkpoints, save.step)
        if self._outcome is Outcome.FAILED:
            self._give_up(save)
            if self._topology.rank == 0:
                LOG.error("could not save %s; the last good checkpoint stays, training goes on", final)
        elif self._topology.rank == 0 and self._outcome is Outcome.SAVED:
            LOG.info("saved %s", final)
            self.whole.add(final)
            self._events.write("saved", step=save.step, seconds=time.perf_counter() - began)
            self._attempt(lambda: self._retire(save.checkpoints))

    def _save(self, save: Save) -> None:
        self._fence.check()
        unfinished = unfinished_folder(save.checkpoints, save.step, self._fence.number)
        unfinished.mkdir(exist_ok=True)  # Other hosts may learn late that rank 0 made it.
        write_pieces(unfinished, self._topology.rank, save.pieces, self._staging)
        if self._topology.rank == 0:
            self._wait_for_others(unfinished)
            final = step_folder(save.checkpoints, save.step)
            publish(unfinished, final, {**save.facts, "incarnation": self._fence.number}, self._fence.check)

    def _wait_for_others(self, unfinished: Path) -> None:
        expected = {rank_file(rank) for rank in range(self._topology.world_size)}
        deadline = time.monotonic() + self._others_seconds
        pause = 0.01
        while missing := expected - (names := {f.name for f in unfinished.iterdir()}):
            failed = sorted(name for name in names if name.endswith(".failed"))
            if failed:
                raise OSError(f"{unfinished}: {', '.join(failed)}")
            if time.monotonic() > deadline:
                names_missing = ", ".join(sorted(missing)[:8])
                raise OSError(f"{unfinished}: no {names_missing} after {self._others_seconds:g} s")
            time.sleep(pause)
            pause = min(1.0, pause * 1.5)

    def _give_up(self, save: Save) -> None:
        """Free this rank's space, and tell rank 0 by a file."""
        unfinished = unfinished_folder(save.checkpoints, save.step, self._fence.number)
        if self._topology.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            return
        mine = unfinished / f"rank-{self._topology.rank:05d}"
        try:
            mine.with_suffix(".safetensors").unlink(missing_ok=True)
            mine.with_suffix(".failed").touch()
        except OSError:
            LOG.error("rank %d could not tell rank 0 that its save failed", self._topology.rank)

    def _retire(self, checkpoints: Path) -> None:
        self._fence.check()
        retire(checkpoints, self._retention, self.whole)

    def _attempt(self, action: Callable[[], None]) -> Outcome:
        """Run a storage action; what goes wrong is logged and ends no run by itself."""
        try:
            action()
        except Fenced as error:
            self._fenced = error
            return Outcome.FENCED
        except Exception as error:
            self.reason, storage = str(error), isinstance(error, OSError)
            what = "storage error" if storage else "saving failed"
            rank, host = self._topology.rank, os.uname().nodename
            LOG.error("%s on rank %d (%s): %s", what, rank, host, error, exc_info=not storage)
            return Outcome.FAILED
        return Outcome.SAVED

    def _agree(self, outcome: Outcome) -> bool:
        worst = torch.tensor(float(outcome), device=self._topology.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._topology.world_group)
        if int(worst) == Outcome.FENCED:
            raise self._fenced or Fenced(
                f"incarnation {self._fence.number} ends and saves nothing: a newer start owns the run"
            )
        return int(worst) == Outcome.SAVED


def retire(checkpoints: Path, rule: Retention, whole: set[Path] | None = None) -> None:
    """Delete checkpoints that the rule lets go, and unfinished ones that are no newer than the newest.

    A damaged checkpoint never counts as one of the newest, and goes only when it is older than all of them.

    Checkpoints that are not known to be whole are read, and what is found is noted in ``whole``.
    """
    whole = set() if whole is None else whole
    finished = {step_of(folder): folder for folder in finished_folders(checkpoints)}
    found = (step for step, folder in finished.items() if _is_whole(folder, whole))
    newest = list(itertools.islice(found, rule.last))
    if not newest:
        return
    losses = {step: _loss(folder) if rule.best else None for step, folder in finished.items()}
    kept = rule.kept(losses, newest)
    unfinished = [f for f in checkpoints.glob(f"step-*{UNFINISHED}*") if f.is_dir()]
    abandoned = [f for f in step_folders(checkpoints) if not (f / MANIFEST).exists()]
    gone = [folder for step, folder in finished.items() if step < newest[-1] and step not in kept]
    gone += [folder for folder in (*unfinished, *abandoned) if step_of(folder) <= newest[0]]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)


def _is_whole(folder: Path, whole: set[Path]) -> bool:
    """Whether a reader could use a finished checkpoint, judged by all its bytes where that is not known."""
    if folder not in whole:
        try:
            CheckpointReader(folder).verify()
        except DamagedCheckpoint as error:
            LOG.warning("%s does not count as a checkpoint to keep: %s", folder, error)
            return False
        whole.add(folder)
    return refusal(folder) is None


def _loss(folder: Path) -> float | None:
    try:
        loss = read_json(folder / MANIFEST).get("loss")
        return float(loss) if isinstance(loss, int | float) else None
    except (OSError, ValueError, AttributeError, OverflowError):
        return None
