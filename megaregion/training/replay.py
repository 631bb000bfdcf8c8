"""A captured step taken again: what of it is the first that is not finite."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megaregion.config import RunConfig
from megaregion.data.batch import read_batch
from megaregion.errors import StopRequest, UserError
from megaregion.parallel.topology import Topology, all_gather_strings
from megaregion.training.losses import StepSums
from megaregion.training.trainer import Trainer, Values

SCRATCH = ".replay"
"""Folder beside the capture's files that a replay needs while it goes on."""


class Replay(Trainer):
    """One rank that takes a captured step and moves nothing."""

    def __init__(self, folder: Path, config: RunConfig, place: Topology) -> None:
        super().__init__(config, place, StopRequest())
        self.state.load(CheckpointReader(folder))
        self._folder, self._calls = folder, 0
        self.found: dict[str, tuple[int, str]] = {}
        """By what it is, the first that was not finite: when, counted in calls, and its name."""
        for name, module in self.engine.module.named_modules():
            module.register_forward_hook(partial(self._see_output, name or "the encoder"))
        for name, parameter in self.engine.parameters.items():
            self._see("weight", name, parameter)
            parameter.register_hook(partial(self._see, "gradient", name))

    def take(self) -> Values:
        """Take the step; gives its losses and its gradient norm."""
        place, count = self.topology, len(self._positions(self.state.position))
        files = (micro_step * place.data_size + place.data_rank for micro_step in range(count))
        return self.train_step(read_batch(self._folder, number) for number in files)

    def _see_output(self, name: str, module: nn.Module, inputs: Any, given: Any) -> None:
        for one in given if isinstance(given, tuple | list) else (given,):
            if isinstance(one, Tensor):
                self._see("output", name, one)

    def _see(self, what: str, name: str, values: Tensor) -> None:
        self._calls += 1
        bad = int((~values.detach().isfinite()).sum())
        if bad and what not in self.found:
            self.found[what] = self._calls, f"{name}, {bad:,} of {values.numel():,} values"

    def _accepts(self, sums: StepSums, norm: Tensor) -> bool:
        return False

    def _skip(self, sums: StepSums, norm: Tensor) -> Values:
        self.engine.drop()
        self.heads.skip()
        return {**sums.means(), "gradient norm": norm.item()}


def replay(folder: Path, config: RunConfig, place: Topology) -> dict[str, str]:
    """What the step gives, by name, on rank 0; nothing on others; a collective.

    Raises:
        UserError: The capture is damaged, or its micro-batches do not divide over the ranks.
    """
    config = dataclasses.replace(
        config, output=str(folder), name=SCRATCH,
        parallel=dataclasses.replace(config.parallel, tensor=place.tensor_size),
    )  # fmt: skip
    try:
        taken = Replay(folder, config, place)
        values = taken.take()
    except (DamagedCheckpoint, OSError) as error:
        raise UserError(f"{folder} is damaged ({error}); copy it again") from None
    finally:
        if place.rank == 0:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    ranks = [json.loads(text) for text in all_gather_strings(json.dumps(taken.found), place)]
    firsts = {}
    for what in ("weight", "output", "gradient"):
        # All ranks make the same calls: the earliest is where it begins.
        found = [(*ranks[rank][what], rank) for rank in range(len(ranks)) if what in ranks[rank]]
        firsts[f"first {what} not finite"] = "{1} (rank {2})".format(*min(found)) if found else "none"
    here = f"tensor {place.tensor_size} x data {place.data_size}"
    return (
        {"ranks": here, **{name: str(value) for name, value in values.items()}, **firsts}
        if not place.rank
        else {}
    )
