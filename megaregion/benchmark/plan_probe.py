"""One rank of the run that a plan is held against: what its machine reaches, then real training steps.

Started by torch.distributed.run, one process a rank; every rank probes and trains while the others do, for
that is what they will meet. Rank 0 writes what it found as JSON.

Shapes: B images, T image tokens, D width, M MLP width, H heads, d head width.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megaregion.benchmark.measure import PeakMemory
from megaregion.config import RunConfig, config_from_dict
from megaregion.models.recompute import watch_kept
from megaregion.models.rotary import rotation, split_and_turn

Clock = Callable[[], float]
"""Seconds from some beginning."""

ROUNDS = 5
M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
MATRIX = 1536
"""Side of the product that the matrix rate is taken from."""


def main() -> int:
    """Probe, train, write; arguments: the run's settings, the file to write, the clock."""
    import deepspeed  # noqa: F401  # loaded before memory is looked at: it is no part of any plan

    from megaregion.parallel import topology

    clock = time.process_time if sys.argv[3] == "processor" else time.perf_counter
    config: RunConfig = config_from_dict(json.loads(Path(sys.argv[1]).read_text()))
    place = topology.join(config.parallel.tensor)
    found: dict[str, Any] = {"rates": probe(config, place.world_group, clock)}
    found.update(train(config, place, clock))
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    topology.leave()
    return 0


def probe(config: RunConfig, group: Any, clock: Clock) -> dict[str, float]:
    """What this rank reaches while all ranks do the same, under the names of ``Hardware``'s fields."""
    model, batch = config.model, config.train.micro_batch
    tokens, width = batch * (1 + model.grid**2), model.width
    square = torch.randn(MATRIX, MATRIX)
    matrix = 2 * MATRIX**3 / _seconds(lambda: square @ square, group, clock)
    shapes = [(width, 3 * width), (width, width), (width, model.mlp_width), (model.mlp_width, width)]
    linears = [nn.Linear(*shape) for shape in shapes]
    inputs = [torch.randn(tokens, shape[0], requires_grad=True) for shape in shapes]
    outputs = [torch.randn(tokens, shape[1]) for shape in shapes]
    products = _seconds(
        lambda: [linear(x).backward(by) for linear, x, by in zip(linears, inputs, outputs, strict=True)],
        group,
        clock,
    )
    flops = sum(6 * tokens * a * b for a, b in shapes)
    reads = [
        torch.randn(batch, model.heads, 1 + model.grid**2, model.head_dim, requires_grad=True) for _ in "qkv"
    ]
    by = torch.randn_like(reads[0])
    attention = _seconds(
        lambda: F.scaled_dot_product_attention(reads[0], reads[1], reads[2]).backward(by), group, clock
    )
    moved, passes = _passes(config)
    rates = {
        "matrix_tflops": matrix / 1e12,
        "linear_share": flops / products / matrix,
        "attention_share": 12 * tokens * (1 + model.grid**2) * width / attention / matrix,
        "memory_gbytes": moved / _seconds(passes, group, clock) / 1e9,
    }
    ranks = dist.get_world_size(group)
    if ranks > 1:
        payload = torch.ones(4 << 20)
        seconds = _seconds(lambda: dist.all_reduce(payload, group=group), group, clock)
        rates["inside_gbytes"] = 2 * (ranks - 1) / ranks * payload.numel() * 4 / seconds / 1e9
        small = torch.ones(1)
        rates["latency_us"] = _seconds(lambda: dist.all_reduce(small, group=group), group, clock) * 1e6
    return rates


def _passes(config: RunConfig) -> tuple[float, Callable[[], object]]:
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


def _seconds(work: Callable[[], object], group: Any, clock: Clock) -> float:
    """Median of some rounds, begun together by all ranks."""
    taken = []
    for _ in range(ROUNDS + 1):
        dist.barrier(group)
        began = clock()
        work()
        taken.append(clock() - began)
    return statistics.median(taken[1:])


def train(config: RunConfig, place: Any, clock: Clock) -> dict[str, Any]:
    """Take the run's steps; the first is left out of the times.

    Returns:
        seconds (median of a step), peak bytes beyond what the process had, and bytes of tensors by kind.
    """
    from megaregion.training.metrics import open_log
    from megaregion.training.signals import StopRequest
    from megaregion.training.trainer import Trainer

    memory = PeakMemory(place.device)
    _returning(at_once=True)
    before = memory.now()
    open_log(Path(config.output) / config.name / "logs", place.rank)
    trainer = Trainer(config, place, StopRequest())
    batches = trainer._loader.batches(trainer._positions())
    seconds = []
    try:
        trainer.train_step(batches)
        memory.reset()
        trainer.train_step(batches)
        peak = memory.peak() - before
        kinds = {**state_bytes(trainer), "activations": kept_bytes(trainer, next(batches))}
        _returning(at_once=False)
        for _ in range(config.train.steps):
            dist.barrier(place.world_group)
            began = clock()
            trainer.train_step(batches)
            seconds.append(clock() - began)
    finally:
        trainer._loader.close()
    return {"seconds": statistics.median(seconds[1:]), "peak": peak, "kinds": kinds}


def _returning(at_once: bool) -> None:
    """Let glibc give freed memory back at once, so that the resident set is what tensors have touched.

    By default it keeps freed pages for later, which is faster: times are taken after memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16 if at_once else 32 << 20)
        libc.malloc_trim(0)


def state_bytes(trainer: Any) -> dict[str, int]:
    """Bytes of what stays from step to step, by the plan's kinds."""
    optimizer, parameters = trainer.engine._optimizer, trainer.engine._parameters.values()
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = [master for group in inner.param_groups for master in group["params"]]
    stays = {id(p) for p in parameters}
    heads = trainer.heads.by_kind.values()
    return {
        "weights": storage_bytes(p.data for p in parameters),
        "masters": storage_bytes(master for master in masters if id(master) not in stays),
        "moments": storage_bytes(
            value for state in inner.state.values() for key, value in state.items() if key.startswith("exp_")
        ),
        "head": sum(storage_bytes(piece.tensor for piece in head.state().values()) for head in heads),
    }


def kept_bytes(trainer: Any, batch: Any) -> int:
    """Bytes that autograd keeps of one forward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in trainer.engine._parameters.values()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor

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
