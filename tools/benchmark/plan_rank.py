"""One rank of the run that a plan is held against: real training steps, and what its machine reaches.

Started by torch.distributed.run, one process a rank. Rank 0 writes what it found as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmark.memory import PeakMemory
from megaregion.config import RunConfig, config_from_dict
from megaregion.models.layers import Linear, run_and_count
from megaregion.models.rotary import rotation, split_and_turn
from megaregion.parallel import topology
from megaregion.parallel.zero import REDUCE_BUCKET
from megaregion.planning.dry_run import state_bytes
from megaregion.planning.layout import body_parameters
from megaregion.processor import keep_freed_memory, product, return_freed_memory

Clock = Callable[[], float]
"""Seconds from some beginning."""
Work = Callable[[], object]

MATRIX = 1536
"""Side of the product that the matrix rate is taken from."""


def main() -> int:
    """Probe, train, write; arguments: the run's settings, the file to write, the clock."""
    import deepspeed  # noqa: F401  # loaded before memory is looked at: it is no part of any plan

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
        rates (see MachineProbe), seconds (median of a step), peak bytes beyond what the process had, and
        bytes of tensors by kind.
    """
    from megaregion.errors import StopRequest
    from megaregion.training.metrics import open_log
    from megaregion.training.trainer import Trainer

    # From the first tensor on: what has been freed amid what is kept would count as memory in use.
    return_freed_memory()
    probe, memory = MachineProbe(config, place.world_group, clock), PeakMemory(place.device)
    return_freed_memory()
    before = memory.now()
    open_log(Path(config.output) / config.name / "logs", place.rank)
    trainer = Trainer(config, place, StopRequest())
    batches = trainer.batches()
    seconds = []
    try:
        trainer.train_step(batches)
        return_freed_memory()
        memory.reset()
        trainer.train_step(batches)
        peak = memory.peak() - before
        batch = next(batches)
        kinds = state_bytes(trainer.engine, trainer.heads.by_kind.values())
        _, kinds["activations"] = run_and_count(
            trainer.engine.parameters.values(), lambda: trainer.encode(batch)
        )
        keep_freed_memory()
        for _ in range(config.train.steps):
            probe.round()
            dist.barrier(place.world_group)
            began = clock()
            trainer.train_step(batches)
            seconds.append(clock() - began)
    finally:
        trainer.loader.close()
    return {
        "rates": probe.rates(),
        "seconds": statistics.median(seconds[1:]),
        "peak": peak,
        "kinds": kinds,
    }


class MachineProbe:
    """Rates of one rank while all ranks ask for them."""

    def __init__(self, config: RunConfig, group: Any, clock: Clock) -> None:
        self._group, self._clock = group, clock
        square = torch.randn(MATRIX, MATRIX)
        elements = body_parameters(config.model, config.head.embedding_dim).on_rank(1)
        bucket = torch.ones(min(REDUCE_BUCKET, elements))
        added = torch.ones_like(bucket)
        # By name: what is done, and its operations or bytes.
        self._work: dict[str, tuple[float, Work]] = {
            "matrix": (2 * MATRIX**3, lambda: product(square, square)),
            "linears": _linears(config),
            "attention": _attention(config),
            "passes": _passes(config),
            "stream": (12 * len(bucket), lambda: added.add_(bucket)),
        }
        ranks = dist.get_world_size(group)
        if ranks > 1:
            bucket = bucket[: len(bucket) // ranks * ranks]
            own, small = bucket.chunk(ranks)[dist.get_rank(group)].clone(), torch.ones(1)
            sent = (ranks - 1) / ranks * 4 * len(bucket)
            self._work["reduce"] = (2 * sent, lambda: dist.all_reduce(bucket, group=group))
            self._work["gather"] = (sent, lambda: dist.all_gather_into_tensor(bucket, own, group=group))
            self._work["latency"] = (1, lambda: dist.all_reduce(small, group=group))
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self.round()
        # What comes first pays for what is made once.
        self._seconds.clear()

    def round(self) -> None:
        """Do everything once more."""
        for name, (_, work) in self._work.items():
            dist.barrier(self._group)
            began = self._clock()
            work()
            self._seconds[name].append(self._clock() - began)

    def rates(self) -> dict[str, float]:
        """Medians of all rounds, under the names of ``Hardware``'s fields."""
        seconds = {name: statistics.median(taken) for name, taken in self._seconds.items()}
        rate = {name: amount / seconds[name] for name, (amount, _) in self._work.items()}
        found = {
            "matrix_tflops": rate["matrix"] / 1e12,
            "linear_share": rate["linears"] / rate["matrix"],
            "attention_share": rate["attention"] / rate["matrix"],
            "memory_gbytes": rate["passes"] / 1e9,
            "stream_gbytes": rate["stream"] / 1e9,
        }
        if "reduce" in rate:
            # As ZeRO sends: gradients by all-reduce, parameters by gather, at which gloo is slower.
            sent = self._work["reduce"][0] + self._work["gather"][0]
            found["inside_gbytes"] = sent / (seconds["reduce"] + seconds["gather"]) / 1e9
            found["latency_us"] = seconds["latency"] * 1e6
        return found


def _linears(config: RunConfig) -> tuple[float, Work]:
    """A block's four linears, forward and backward."""
    model = config.model
    width, tokens = model.width, config.train.micro_batch * (1 + model.grid**2)
    shapes = [(width, 3 * width), (width, width), (width, model.mlp_width), (model.mlp_width, width)]
    linears = [Linear(*shape) for shape in shapes]
    inputs = [torch.randn(tokens, shape[0], requires_grad=True) for shape in shapes]
    outputs = [torch.randn(tokens, shape[1]) for shape in shapes]

    def work() -> None:
        for linear, x, by in zip(linears, inputs, outputs, strict=True):
            linear(x).backward(by)

    return sum(6 * tokens * a * b for a, b in shapes), work


def _attention(config: RunConfig) -> tuple[float, Work]:
    model, batch = config.model, config.train.micro_batch
    length = 1 + model.grid**2
    query, key, value = (
        torch.randn(batch, model.heads, length, model.head_dim, requires_grad=True) for _ in "qkv"
    )
    by = torch.randn_like(query)
    return 12 * batch * length * length * model.width, lambda: F.scaled_dot_product_attention(
        query, key, value
    ).backward(by)


def _passes(config: RunConfig) -> tuple[float, Work]:
    """What stands between a block's products, forward and backward, and the bytes that the plan counts."""
    model, batch = config.model, config.train.micro_batch
    length = 1 + model.grid**2
    image = torch.randn(batch, length, model.width, requires_grad=True)
    hidden = torch.randn(batch, length, model.mlp_width, requires_grad=True)
    qkv = torch.randn(batch, length, model.heads, 3, model.head_dim, requires_grad=True)
    angles = rotation(torch.zeros(model.head_dim // 2), model.grid, model.grid, model.rope_theta, batch)
    norms = nn.LayerNorm(model.width), nn.LayerNorm(model.width)
    by_image, by_hidden = torch.randn_like(image), torch.randn_like(hidden)
    by_heads = [torch.randn(batch, model.heads, length, model.head_dim) for _ in "qkv"]

    def passes() -> None:
        torch.autograd.backward(split_and_turn(qkv, angles), by_heads)
        F.gelu(hidden).backward(by_hidden)
        residual = image + norms[0](image)
        (residual + norms[1](residual)).backward(by_image)

    # As megaregion/planning/timing.py counts them, without the biases' sums, which linears do.
    return batch * length * 4 * (50 * model.width + 5 * model.mlp_width), passes


if __name__ == "__main__":
    from megaregion.command_line import run

    run(main, teardown=False)
