"""Take a step that was not finite again, and name where it stops being finite.

python tools/replay.py runs/NAME/captures/step-00000012
torchrun --standalone --nproc-per-node 4 tools/replay.py runs/NAME/captures/step-00000012

The guard keeps the batch and the state of such a step (guard.captures). Any number of ranks that divides its
micro-batches takes it, for samples, negatives and weights do not depend on ranks; the same ranks take it bit
for bit. Nothing of the run is changed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megaregion.bounds import Folder, shown
from megaregion.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megaregion.command_line import Parser, run
from megaregion.config import RunConfig
from megaregion.errors import StopRequest, UserError
from megaregion.files import read_json
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology, all_gather_strings
from megaregion.schemas.evaluation import aligned
from megaregion.settings import read_file
from megaregion.training.heads import StepSums
from megaregion.training.state import CAPTURE, read_batch
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


def main() -> None:
    parser = Parser(
        description="Take a step that was not finite again, and name where it stops being finite."
    )
    parser.add_flag(
        "capture", Folder, None, "runs/NAME/captures/step-N, as the guard left it", metavar="CAPTURE"
    )
    folder = parser.parse_args().capture
    try:
        known = read_json(folder / CAPTURE)
    except (OSError, ValueError):
        raise UserError(
            f"{folder} is no capture: it has no {CAPTURE}; name runs/NAME/captures/step-N"
        ) from None
    config = read_file(RunConfig(), folder / "config.yaml")
    # As many ranks share the model as did, if there are so many.
    tensor = config.parallel.tensor if topology.launched_as()[1] % config.parallel.tensor == 0 else 1
    told = replay(folder, config, topology.join(tensor))
    if told:
        print(report(known, told))
    topology.leave()


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


def report(known: dict[str, Any], told: dict[str, str]) -> str:
    """The outcome beside what the run saw."""
    then = {
        "ranks": "tensor {tensor} x data {data}".format(**known["ranks"]),
        "loss": known["loss"], "gradient norm": known["grad_norm"],
    }  # fmt: skip
    rows = [("", "now", "then"), *((name, value, then.get(name, "")) for name, value in told.items())]
    lines = [f"step {known['step']}: {known['reason']}", aligned(rows, left=(0, 1, 2)), ""]
    if all(value == "none" for name, value in told.items() if name.startswith("first")):
        lines.append("All of it is finite here: suspect the machine that took it, or the order of its sums.")
    suspects = list(dict.fromkeys(known["not_finite"] or known["keys"]))
    lines.append(f"samples ({len(suspects)}): {', '.join(map(shown, suspects))}")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run(main, teardown=False)
