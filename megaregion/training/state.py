"""What a run carries from step to step, how it is saved and found again, and what may change in between.

A save never leaves a half-written checkpoint and never ends a run: the next one tries again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from megaregion.bounds import shown
from megaregion.checkpoint.fence import Fence, refusal
from megaregion.checkpoint.format import (
    AVERAGES,
    ENCODER,
    MANIFEST,
    Piece,
    finished_folders,
    step_folder,
    step_folders,
    step_of,
)
from megaregion.checkpoint.pretrained import FUNCTION
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint, copy_again, usable_folders
from megaregion.checkpoint.saver import Retention, Save, Saver, Snapshot
from megaregion.config import RunConfig
from megaregion.data.batch import Batch, write_batch
from megaregion.data.info import DatasetInfo
from megaregion.errors import UserError
from megaregion.files import write_text
from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology, all_gather_strings, host_name
from megaregion.parallel.zero import ZeroEngine
from megaregion.schemas.run import Events
from megaregion.settings import sections, to_yaml
from megaregion.training.faults import WAY_OUT, LossGuard
from megaregion.training.losses import Heads
from megaregion.training.metrics import LOG

RESCUE = "rescue"
"""Folder of a checkpoint that found no room among the others."""
CAPTURES, CAPTURE = "captures", "capture.json"
"""Folder of refused steps in the run's, and the file that says that one of them is whole."""
MEMORY = Path("/dev/shm")
"""A file system in memory, where there is one."""

FIXED = {
    "model": (*FUNCTION, "region_layers", "region_weights", "region_start"),
    "data": ("mean", "std"),
    "head": ("embedding_dim",),
    "optimizer": ("name",),
}
"""Settings by section that give weights and moments their meaning: another value is refused. All others say
how the run computes, how long and on which images: another value is told and noted (tests list them, so that
a new setting must be decided)."""

LABELS = ("object_classes", "text_classes", "centers_sha256", "tokenizer_sha256")
"""What the heads learn, of a dataset."""

Change = tuple[Any, Any]
"""The old value and the new one."""


class TrainingState:
    """Steps taken, position in the data, body, moments, heads and the guard's memory."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        engine: ZeroEngine,
        heads: Heads,
        dataset: DatasetInfo,
        fence: Fence,
        events: Events,
    ) -> None:
        self.step = 0
        """Optimizer steps taken."""
        self.position = 0
        """Next sample of the endless stream, over all ranks."""
        self.blocked = 0.0
        """Seconds that the last save or wait took from training."""
        self.guard = LossGuard(config.guard)
        self.checkpoints = Path(config.output) / config.name / "checkpoints"
        """Where the run saves."""
        self._config, self._topology, self._dataset = config, topology, dataset
        self._engine, self._heads = engine, heads
        self._events, self._fence = events, fence
        self._losses: list[float] = []
        settings = config.checkpoint
        local = Path(settings.local) / config.name if settings.local else None
        retention = Retention(settings.keep_last, settings.keep_every, settings.keep_best)
        self._saver = Saver(topology, fence, events, retention, local)
        self._snapshot = Snapshot(topology.device)

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.position += self._config.train.global_batch

    def skip(self) -> None:
        """Count the samples of a refused step, which is no step."""
        self.position += self._config.train.global_batch

    def note_loss(self, loss: float | None) -> None:
        """Remember a logged loss: the mean since the previous save goes into the next manifest."""
        if loss is not None and math.isfinite(loss):
            self._losses.append(loss)

    def save(self) -> None:
        """Save the state of this step; a collective. A save that is still under way is waited for first.

        With checkpoint.asynchronous it returns as soon as the state is copied; training may go on, and the
        bytes written are those of this step.

        Raises:
            Fenced: A newer incarnation owns the run.
        """
        with self._blocking():
            self._saver.wait()
            if self._start(self._saver, self.checkpoints) and not self._config.checkpoint.asynchronous:
                self._saver.wait()

    def finish(self) -> bool:
        """Wait for the last save, or try again if it failed; whether the step's state is saved; a collective.

        Raises:
            Fenced: A newer incarnation owns the run.
        """
        with self._blocking():
            self._saver.wait()
        if self._saver.saved != self.step:
            self.save()
            with self._blocking():
                self._saver.wait()
        return self._saver.saved == self.step

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        """Count what a save takes from training."""
        began = time.perf_counter()
        yield
        self.blocked = time.perf_counter() - began
        self._events.write("blocked", step=self.step, seconds=self.blocked)

    def rescue(self) -> UserError:
        """Write the state to any other place that takes it, and give what there is to tell; a collective."""
        reasons = [text for text in all_gather_strings(self._saver.reason, self._topology) if text]
        line = f"the last checkpoint, of step {self.step}, could not be saved in {self.checkpoints}"
        line += f" ({reasons[0]})" if reasons else ""
        for place in self._other_places():
            saver = Saver(self._topology, self._fence, self._events, Retention(last=1))
            if self._start(saver, place) and saver.wait():
                copy = step_folder(place, self.step)
                return UserError(f"{line}; a copy is in {copy}: move it there and use --resume auto")
        return UserError(f"{line}, and no other place took it; make room and resume from the one before")

    def capture(self, batches: Iterator[Batch], refusal: Mapping[str, Any]) -> None:
        """Keep the present state and this rank's batches of a refused step for a replay; a collective.

        Any topology replays a checkpoint and batches by place in the global batch. What fails is told.
        """
        place, folder = self._topology, self.checkpoints.parent / CAPTURES
        losses, saver = self._losses, Saver(place, self._fence, Events(folder, False), Retention(2**31))
        with self._blocking():
            self._saver.wait()
            whole = self._start(saver, folder) and saver.wait()
        self._losses, folder, reason = losses, step_folder(folder, self.step), ""
        try:
            for micro_step, batch in enumerate(batches if whole else ()):
                write_batch(folder, micro_step * place.data_size + place.data_rank, batch)
        except Exception as error:  # No capture is worth a run.
            reason = f"rank {place.rank}: {error}"
        reasons = [text for text in all_gather_strings(reason, place) if text]
        if place.rank == 0 and reasons:
            LOG.error("%s could not be kept (%s); training goes on", folder, reasons[0])
            shutil.rmtree(folder, ignore_errors=True)
        elif place.rank == 0 and whole:
            told = {**refusal, "ranks": {"tensor": place.tensor_size, "data": place.data_size}}
            try:
                write_text(folder / "config.yaml", to_yaml(self._config))
                write_text(folder / CAPTURE, json.dumps(told))
                LOG.warning("kept for a replay: python tools/replay.py %s", folder)
            except OSError as error:
                LOG.error("%s is no whole capture (%s); training goes on", folder, error)

    def _start(self, saver: Saver, checkpoints: Path) -> bool:
        saved = saver.prepare(checkpoints, self.step)
        if saved:
            own = own_pieces(self._engine, self._heads)
            if self._config.checkpoint.asynchronous:
                pieces = self._snapshot.take(own)
            else:
                pieces = [dataclasses.replace(one, tensor=one.tensor.detach().cpu()) for one in own]
            saver.start(Save(checkpoints, self.step, pieces, self._facts()))
            self._losses = []
        return saved

    def _other_places(self) -> list[Path]:
        """Where a copy may go that the checkpoints folder does not take, for all ranks; a collective."""
        places = [self.checkpoints.parent / RESCUE]
        if len(set(all_gather_strings(host_name(), self._topology))) == 1:
            local = self._config.checkpoint.local
            places += [Path(local) / self._config.name / RESCUE] if local else []
            places += [MEMORY / f"megaregion-{self._config.name}-{RESCUE}"]
        return places

    def settle(self) -> None:
        """Give a save under way some time when this rank ends by an error; no collective."""
        self._saver.settle(seconds=30)

    def fenced(self) -> bool:
        """Whether rank 0 has seen a newer start of this run, so that this one must stop; no collective."""
        return self._topology.rank == 0 and self._fence.lost()

    def resume(self, checkpoints: Path | None = None) -> bool:
        """Go on from the newest checkpoint that is whole, of the run's own if None; a collective.

        It may be called at the start and in the middle of a run; a save under way is waited for. Every rank
        checks its share of the files' checksums.

        Returns:
            Whether there was one.

        Raises:
            UserError: The checkpoint does not fit the settings or the dataset, or there are checkpoints and
                none is whole: to begin anew would be to train over them.
        """
        self._saver.wait()
        checkpoints = checkpoints or self.checkpoints
        usable, reason = self._candidates(checkpoints)
        for step in usable:
            folder = step_folder(checkpoints, step)
            reader, damage = None, ""
            try:
                reader = CheckpointReader(folder)
                reader.verify(reader.files()[self._topology.rank :: self._topology.world_size])
            except DamagedCheckpoint as error:
                damage = str(error)
            found = [text for text in all_gather_strings(damage, self._topology) if text]
            if reader is not None and not found:
                try:
                    self.load(reader)
                except DamagedCheckpoint as error:
                    raise copy_again(error) from error
                return True
            if self._topology.rank == 0:
                LOG.warning("skipped %s: %s", folder, found[0])
            reason = reason or found[0]
        if reason:
            raise UserError(
                f"{checkpoints} holds checkpoints, but none is whole ({reason}); copy one there again, move "
                "them away to begin anew, or use another --name"
            )
        return False

    def go_back(self) -> None:
        """Return to the last checkpoint and go on with the data behind the refused steps; a collective.

        Raises:
            UserError: There is none, or the run has gone back too often.
        """
        guard, step, position = self.guard, self.step, self.position
        guard.check_rollback()
        refused, skipped, rollbacks = guard.consecutive, guard.skipped, guard.rollbacks
        if not self.resume():
            raise UserError(
                f"the loss guard refused {refused} steps in a row after step {step} and there is no "
                f"checkpoint to go back to; {WAY_OUT}"
            )
        self.position = position
        guard.went_back(skipped, rollbacks)
        LOG.warning(
            "went back from step %d to step %d and on from position %d (return %d)",
            step, self.step, position, rollbacks + 1,
        )  # fmt: skip

    def _candidates(self, checkpoints: Path) -> tuple[list[int], str]:
        """Steps of the usable checkpoints that rank 0 finds, newest first, and what a cut one lacks."""
        steps, reason = [], ""
        if self._topology.rank == 0:
            steps = [step_of(folder) for folder in usable_folders(checkpoints)]
            cut = [folder for folder in step_folders(checkpoints) if not (folder / MANIFEST).exists()]
            reason = f"{cut[0]} has no {MANIFEST}" if cut else ""
        steps, reason = json.loads(all_gather_strings(json.dumps([steps, reason]), self._topology)[0])
        return steps, reason

    def load(self, reader: CheckpointReader) -> None:
        """Take over a checkpoint's state, whatever topology wrote it; a collective."""
        position = int(reader.manifest["position"])
        changed = check_fits(reader, self._run_facts(position), self._engine.placements)
        self._losses = []

        def read(name: str, place: Placement) -> Tensor:
            key = f"body.{name}"
            if key.startswith(AVERAGES) and key not in reader.names():
                key = ENCODER + key.removeprefix(AVERAGES)  # The average begins here.
            return reader.read(key, place.offset, place.shape)

        self._engine.load(read, reader.step)
        self._heads.load(reader)
        self.step, self.position = reader.step, position
        self.guard.load(reader.manifest.get("guard"))
        self._saver.saved = self.step
        self._saver.whole.add(reader.folder)
        if self._topology.rank == 0:
            LOG.info("resumed from %s, position %d", reader.folder, self.position)
            if changed:
                LOG.info("this start has other settings: %s", told(changed))
            if self.step > self._config.train.steps:
                LOG.warning(
                    "train.steps %d lies below step %d of %s: nothing is left to train",
                    self._config.train.steps, self.step, reader.folder,
                )  # fmt: skip
        self._events.write("resumed", step=self.step, changed=changed)

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": self.position,
            "loss": sum(self._losses) / len(self._losses) if self._losses else None,
            "guard": self.guard.state(),
            **self._run_facts(self.position),
        }

    def _run_facts(self, position: int) -> dict[str, Any]:
        place = self._topology
        return facts(self._config, position, self._dataset, place.tensor_size, place.data_size)


def own_pieces(engine: ZeroEngine, heads: Heads) -> Iterator[Piece]:
    """This rank's share of the state: of the body, and its own classes."""
    for name, place, tensor in engine.pieces():
        yield Piece(f"body.{name}", place.full_shape, place.offset, tensor)
    yield from heads.state()


def check_local(config: RunConfig, topology: Topology) -> None:
    """Refuse a folder of the hosts' own disks that takes no files, before a save needs it; a collective."""
    if not config.checkpoint.local:
        return
    folder = Path(config.checkpoint.local) / config.name
    reason, probe = "", folder / f".probe-{topology.rank:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        reason = f"{host_name()}: {error}"
    if found := [text for text in all_gather_strings(reason, topology) if text]:
        raise UserError(
            f"checkpoint.local: {folder} cannot be written ({found[0]}); name a folder on every host's own "
            "disk, or leave it empty"
        )


def check_newest(
    config: RunConfig, dataset: DatasetInfo, placements: Mapping[str, Placement], topology: Topology
) -> None:
    """Refuse settings that the newest checkpoint does not fit, before the run is claimed; a collective.

    Raises:
        UserError: The run may not go on so; the text says why.
    """
    reason = ""
    if topology.rank == 0:
        try:
            folders = finished_folders(Path(config.output) / config.name / "checkpoints")
            for folder in (one for one in folders if refusal(one) is None):
                with suppress(DamagedCheckpoint):  # Resuming says so, and takes an older one.
                    reader = CheckpointReader(folder)
                    position = int(reader.manifest["position"])
                    ours = facts(config, position, dataset, topology.tensor_size, topology.data_size)
                    check_fits(reader, ours, placements)
                    break
        except UserError as error:
            reason = str(error)
    if reason := all_gather_strings(reason, topology)[0]:
        raise UserError(reason)


def facts(config: RunConfig, position: int, dataset: DatasetInfo, tensor: int, data: int) -> dict[str, Any]:
    """What a checkpoint at a position of the stream says of its run, in the values that JSON has.

    The image size of the model is the one that the encoder was trained on last.
    """
    size = config.stage(max(0, position - 1)).image_size
    present = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=size))
    labels = {key: getattr(dataset, key) for key in LABELS}
    content = {
        "config": dataclasses.asdict(present),
        "dataset": {"samples": dataset.samples, "shards": len(dataset.shards), **labels},
        "ranks": {"tensor": tensor, "data": data},
    }
    return dict(json.loads(json.dumps(content)))


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Change]:
    """What two manifests both name and say differently: settings, ranks, sizes of the dataset; by key."""
    found = {}
    old, new = theirs.get("config", {}), ours["config"]
    for section in sections(RunConfig()):
        for setting in section.settings:
            pair = (_value(old, setting.key), _value(new, setting.key))
            if None not in pair and pair[0] != pair[1]:
                found[setting.key] = pair
    for part in ("dataset", "ranks"):
        for key, value in ours[part].items():
            before = theirs.get(part, {}).get(key, value)
            if before != value:
                found[f"{part}.{key}"] = (before, value)
    return found


def told(changed: Mapping[str, Change]) -> str:
    """As "train.steps 10 -> 20, optimizer.lr 0.1 -> 0.2"."""
    return ", ".join(f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in changed.items())


def check_fits(
    reader: CheckpointReader, ours: Mapping[str, Any], placements: Mapping[str, Placement]
) -> dict[str, Change]:
    """What has changed, all of it free, for a run of which :func:`facts` says ``ours`` to go on from there.

    Raises:
        UserError: It may not go on; the text says why.
    """
    dataset = reader.manifest.get("dataset")
    if not dataset:
        raise UserError(
            f"{reader.folder} holds an encoder to begin with and no run to go on with; give it as --init "
            "to a run with another --name"
        )
    for key in LABELS:
        if dataset.get(key) != ours["dataset"][key]:
            raise UserError(
                f"data.path {ours['config']['data']['path']} has {key} {ours['dataset'][key]}, but the heads "
                f"of {reader.folder} were trained with {dataset.get(key)}; use that dataset, or start a new "
                "run with another --name"
            )
    changed = changes(reader.manifest, ours)
    _refuse_fixed(reader, changed)
    wanted = {f"{ENCODER}{name}": list(place.full_shape) for name, place in placements.items()}
    held = {name: list(reader.shape(name)) for name in reader.names() if name.startswith(ENCODER)}
    for name in (*wanted, *held):
        if wanted.get(name) != held.get(name):
            raise UserError(
                f"{name.removeprefix(ENCODER)} has shape {wanted.get(name, 'none')} by the settings and "
                f"{held.get(name, 'none')} in {reader.folder}; use the model settings and the "
                "distill.teacher of that run (its config.yaml)"
            )
    return changed


def _refuse_fixed(reader: CheckpointReader, changed: Mapping[str, Change]) -> None:
    fixed = {f"{section}.{name}" for section, names in FIXED.items() for name in names}
    refused = {key: pair for key, pair in changed.items() if key in fixed}
    if refused:
        # --init takes weights of the same function only.
        apart = [f"model.{name}" for name in FUNCTION if f"model.{name}" in refused]
        limit = f", which asks for the same {', '.join(apart)}" if apart else ""
        raise UserError(
            f"the weights of {reader.folder} do not go on with {told(refused)}; take the old value, or begin "
            f"a run with another --name by --init {reader.folder}{limit}"
        )


def _value(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
