"""What a run carries from step to step, and how it is saved and found again.

A save never leaves a half-written checkpoint behind and never ends a run: if the disk is full, the last
good one stays, the log says so, and the next save tries again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import RunConfig
from megaregion.data.info import DatasetInfo
from megaregion.errors import UserError
from megaregion.parallel.tensor_parallel import Placement
from megaregion.parallel.topology import Topology
from megaregion.parallel.zero import ZeroEngine
from megaregion.training.checkpoint import (
    CheckpointReader,
    Piece,
    newest_whole,
    publish,
    retire,
    step_folder,
    write_pieces,
)
from megaregion.training.heads import Heads
from megaregion.training.metrics import LOG


class TrainingState:
    """Steps taken, position in the data, body, moments and heads."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        engine: ZeroEngine,
        heads: Heads,
        dataset: DatasetInfo,
    ) -> None:
        self.step = 0
        """Optimizer steps taken."""
        self.position = 0
        """Next sample of the endless stream, over all ranks."""
        self._config = config
        self._topology = topology
        self._engine = engine
        self._heads = heads
        self._dataset = dataset

    def advance(self) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.position += self._config.train.global_batch

    def save(self, checkpoints: Path) -> bool:
        """Write a checkpoint; a collective.

        Returns:
            Whether it is complete and visible; False (on every rank) after a storage error.
        """
        final = step_folder(checkpoints, self.step)
        unfinished = final.with_suffix(".unfinished")
        pieces = list(self._pieces())
        if self._topology.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        saved = self._all_succeed(lambda: unfinished.mkdir(parents=True, exist_ok=True), only_first=True)
        saved = saved and self._all_succeed(lambda: write_pieces(unfinished, self._topology.rank, pieces))
        saved = saved and self._all_succeed(
            lambda: publish(unfinished, final, self._facts()), only_first=True
        )
        if self._topology.rank == 0:
            if saved:
                LOG.info("saved %s", final)
                retire(checkpoints, self._config.checkpoint.keep_last)
            else:
                shutil.rmtree(unfinished, ignore_errors=True)
                LOG.error("could not save %s; the last good checkpoint stays, training goes on", final)
        return saved

    def resume(self, checkpoints: Path) -> bool:
        """Go on from the newest checkpoint that is whole; a collective.

        Returns:
            Whether there was one.

        Raises:
            UserError: The checkpoint does not fit the settings or the dataset.
        """
        step = torch.full((), -1, dtype=torch.int64, device=self._topology.device)
        if self._topology.rank == 0:
            found = newest_whole(checkpoints)
            step.fill_(found.step if found is not None else -1)
        dist.broadcast(step, src=0)
        if step < 0:
            return False
        self.load(CheckpointReader(step_folder(checkpoints, int(step))))
        return True

    def load(self, reader: CheckpointReader) -> None:
        """Take over a checkpoint's state, whatever topology wrote it; a collective.

        Raises:
            UserError: The checkpoint does not fit the settings or the dataset.
        """
        self._check_fits(reader)
        self._engine.state.load(lambda name, place: _read_placed(reader, f"body.{name}", place), reader.step)
        self._heads.load(reader)
        self.step, self.position = reader.step, int(reader.manifest["position"])
        if self._topology.rank == 0:
            LOG.info("resumed from %s, position %d", reader.folder, self.position)

    def _pieces(self) -> Iterator[Piece]:
        """This rank's share of the state: body tensors in turn over the data ranks, its own classes."""
        for index, (name, place, tensor) in enumerate(self._engine.state.tensors()):
            # A tensor that tensor parallelism leaves whole is the same on all tensor ranks.
            repeated = place.shape == place.full_shape and self._topology.tensor_rank > 0
            if index % self._topology.data_size == self._topology.data_rank and not repeated:
                yield Piece(f"body.{name}", place.full_shape, place.offset, tensor.detach().cpu().clone())
        yield from self._heads.state()

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "position": self.position,
            "config": dataclasses.asdict(self._config),
            "dataset": self._labels(),
            "ranks": {"tensor": self._topology.tensor_size, "data": self._topology.data_size},
        }

    def _labels(self) -> dict[str, Any]:
        return {
            "samples": self._dataset.samples,
            "object_classes": self._dataset.object_classes,
            "text_classes": self._dataset.text_classes,
            "centers_sha256": self._dataset.centers_sha256,
            "tokenizer_sha256": self._dataset.tokenizer_sha256,
        }

    def _check_fits(self, reader: CheckpointReader) -> None:
        theirs, ours = reader.manifest["dataset"], self._labels()
        for key in ("object_classes", "text_classes", "centers_sha256", "tokenizer_sha256"):
            if theirs[key] != ours[key]:
                raise UserError(
                    f"data.path {self._config.data.path} has {key} {ours[key]}, but the heads of "
                    f"{reader.folder} were trained with {theirs[key]}; use that dataset, or start a new run "
                    "with another --name"
                )
        for name, place in self._engine.placements.items():
            full = reader.shape(f"body.weight.{name}")
            if full != place.full_shape:
                raise UserError(
                    f"{name} has shape {list(place.full_shape)} by the settings and {list(full)} in "
                    f"{reader.folder}; use the model settings of that run (its config.yaml)"
                )

    def _all_succeed(self, action: Any, only_first: bool = False) -> bool:
        """Run a storage action and agree on whether it worked everywhere; a collective."""
        worked = torch.ones((), device=self._topology.device)
        try:
            if self._topology.rank == 0 or not only_first:
                action()
        except OSError as error:
            LOG.error("storage error on rank %d (%s): %s", self._topology.rank, os.uname().nodename, error)
            worked.zero_()
        dist.all_reduce(worked, op=dist.ReduceOp.MIN, group=self._topology.world_group)
        return bool(worked.item())


def _read_placed(reader: CheckpointReader, name: str, place: Placement) -> Tensor:
    return reader.read(name, place.offset, place.shape)
