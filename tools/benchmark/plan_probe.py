"""One rank of the run that a plan is held against: real training steps, and what its machine reaches.

Started by torch.distributed.run, one process a rank. Rank 0 writes what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from benchmark.machine_probe import Clock, MachineProbe
from benchmark.measure import PeakMemory
from megaregion.config import RunConfig, config_from_dict
from megaregion.heap import keep_freed_memory, return_freed_memory
from megaregion.models.recompute import watch_kept


def main() -> int:
    """Probe, train, write; arguments: the run's settings, the file to write, the clock."""
    import deepspeed  # noqa: F401  # loaded before memory is looked at: it is no part of any plan

    from megaregion.parallel import topology

    clock = time.process_time if sys.argv[3] == "processor" else time.perf_counter
    config: RunConfig = config_from_dict(json.loads(Path(sys.argv[1]).read_text()))
    place = topology.join(config.parallel.tensor)
    found = train(config, place, clock)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    topology.leave()
    return 0


def train(config: RunConfig, place: Any, clock: Clock) -> dict[str, Any]:
    """Take the run's steps, with a round of probes before each; the first is left out of the times.

    Returns:
        rates (see MachineProbe), seconds (median of a step), phases (medians of each, by the wall), peak
        bytes beyond what the process had, and bytes of tensors by kind.
    """
    from megaregion.training.metrics import open_log
    from megaregion.training.signals import StopRequest
    from megaregion.training.trainer import Trainer

    # From the first tensor on: what has been freed amid what is kept would count as memory in use.
    return_freed_memory()
    probe, memory = MachineProbe(config, place.world_group, clock), PeakMemory(place.device)
    return_freed_memory()
    before = memory.now()
    open_log(Path(config.output) / config.name / "logs", place.rank)
    trainer = Trainer(config, place, StopRequest())
    batches = trainer._loader.batches(trainer._positions())
    seconds, phases = [], []
    try:
        trainer.train_step(batches)
        return_freed_memory()
        memory.reset()
        trainer.train_step(batches)
        peak = memory.peak() - before
        kinds = {**state_bytes(trainer), "activations": kept_bytes(trainer, next(batches))}
        keep_freed_memory()
        for _ in range(config.train.steps):
            probe.round()
            dist.barrier(place.world_group)
            began = clock()
            trainer.train_step(batches)
            seconds.append(clock() - began)
            phases.append(trainer._times._phases.take())
    finally:
        trainer._loader.close()
    split = {name: statistics.median(step[name] for step in phases[1:]) for name in phases[0]}
    return {
        "rates": probe.rates(),
        "seconds": statistics.median(seconds[1:]),
        "phases": split,
        "peak": peak,
        "kinds": kinds,
    }


def state_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of what stays from step to step, by the plan's kinds."""
    held, heads = trainer.engine.held(), trainer.heads.by_kind.values()
    return {
        **{kind: storage_bytes(held[kind]) for kind in ("weights", "masters", "moments")},
        "head": sum(storage_bytes(piece.tensor for piece in head.state().values()) for head in heads),
    }


def kept_bytes(trainer: Any, batch: Any) -> int:
    """Bytes that autograd keeps of one forward pass, parameters left out."""
    parameters = trainer.engine.parameters.values()
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        # Asked each time: ZeRO 3 gathers a parameter to another place for every use.
        if all(place != parameter.untyped_storage().data_ptr() for parameter in parameters):
            kept[place] = tensor

    with watch_kept(note):
        embeddings = trainer.engine(trainer._inputs(batch.images), batch.visible)
    size = storage_bytes(kept.values())
    del embeddings
    return size


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; those that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def settings_file(config: RunConfig, path: Path) -> Path:
    """Write a run's settings for :func:`main`."""
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return path


if __name__ == "__main__":
    from megaregion.command_line import run

    run(main, teardown=False)
