"""The planner's memory and step time beside real training on this machine.

As a command it is one rank of that training: torch.distributed.run starts it, rank 0 writes what it found.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmark.measure import Stopwatch, Work
from benchmark.memory import PeakMemory
from benchmark.part import CLOCK, Case, part
from megaregion.bounds import COUNT, Choice, PositiveInt, Several, Whole
from megaregion.checkpoint.reader import config_from_dict
from megaregion.command_line import run
from megaregion.config import (
    CheckpointConfig,
    DataConfig,
    HeadConfig,
    HeadsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.errors import StopRequest, UserError
from megaregion.models.layers import Linear, run_and_count
from megaregion.models.rotary import rotation, split_and_turn
from megaregion.parallel import topology
from megaregion.parallel.zero import REDUCE_BUCKET
from megaregion.planning.dry_run import state_bytes
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import Labels, body_parameters
from megaregion.planning.plan import Plan, make_plan
from megaregion.processor import keep_freed_memory, product, return_freed_memory

CASES: dict[str, tuple[int, ParallelConfig, bool]] = {
    "1": (1, ParallelConfig(), False),
    "2": (2, ParallelConfig(), False),
    "2-tensor": (2, ParallelConfig(tensor=2), False),
    "2-recompute": (2, ParallelConfig(), True),
    "2-zero3": (2, ParallelConfig(zero_stage=3), False),
}
"""Ranks, how they share the work, and whether blocks recompute."""
MODELS = {
    "s16": ModelConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "b16": ModelConfig(),
    "toy": ModelConfig(image_size=64, width=128, depth=3, heads=4, mlp_width=512, region_layers=1),
}
OBJECT_CLASSES, TEXT_CLASSES = 20_000, 2_000
SAMPLES, REGIONS = 64, 12
MEMORY_GOAL, TIME_GOAL = 1 / 1.05, 1 / 1.15
"""The plan within 5% and within 15%."""
MIB = 2**20
MATRIX = 1536
"""Side of the product that the matrix rate is taken from."""


@part(
    ("--case", Several(Choice((*CASES, "all"))), ["1", "2"], "ranks and what is special"),
    ("--model", Choice((*MODELS,)), "b16", "ViT that is trained, at 224 pixels; toy at 64"),
    ("--batch", PositiveInt, 4, "images of a micro-step and rank"),
    ("--steps", Whole(2, COUNT), 4, "timed training steps, the first left out"),
    CLOCK,
)
def plan(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """The planner's memory and step time beside real training on this machine.

    Ours is the plan, made from the config and from rates that the same run measures first, every rank while
    the others do; peer is what training took, through the same engine as any run. Ratios are measured /
    planned, and must not miss the goal either way. With the processor's clock, a rank's own time on one
    thread counts.
    """
    if watch.device.type != "cpu":
        raise UserError("benchmark.py plan measures processors only so far; use --device cpu")
    cores = 1 if watch.processor else options.threads or os.cpu_count() or 1
    for name in CASES if "all" in options.case else options.case:
        ranks = CASES[name][0]
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            config = _training_run(options, name, Path(folder))
            found = _start(config, ranks, max(1, cores // ranks), options.clock, Path(folder))
        # Nothing waits for kernels here.
        rates = {"latency_us": 0.0, "launch_us": 0.0, **found["rates"]}
        machine = Hardware(name="this machine", device="processor", gpus=ranks, gpus_per_node=ranks, **rates)
        planned = make_plan(config, machine, Labels(OBJECT_CLASSES, TEXT_CLASSES, 0.25))
        yield from _compare(planned, found, options.clock)


def _training_run(options: argparse.Namespace, case: str, folder: Path) -> RunConfig:
    """A run in fp32 with two micro-steps a step, on images that are written into the folder."""
    model = MODELS[options.model]
    ranks, parallel, recompute = CASES[case]
    return RunConfig(
        name="plan",
        output=str(folder / "runs"),
        model=model,
        data=DataConfig(path=str(_write_images(folder / "shards")), workers=0, regions_per_image=10),
        head=HeadsConfig(
            embedding_dim=model.width, object=HeadConfig(sample_rate=0.1), text=HeadConfig(sample_rate=1.0)
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        parallel=parallel,
        train=TrainConfig(
            steps=options.steps,
            global_batch=2 * options.batch * ranks // parallel.tensor,
            micro_batch=options.batch,
            precision="fp32",
            recompute=recompute,
            watchdog_seconds=0,
        ),
        checkpoint=CheckpointConfig(every=1_000_000),
    )


def _compare(planned: Plan, found: dict[str, Any], clock: str) -> Iterator[Case]:
    config, ranks = planned.layout.config, planned.layout.ranks
    label = f"{ranks} ranks" if ranks > 1 else "1 rank"
    label += f", tensor {config.parallel.tensor}" if config.parallel.tensor > 1 else ""
    label += f", ZeRO {config.parallel.zero_stage}{', recompute' if config.train.recompute else ''}"

    def memory(what: str, ours: float, peer: float) -> Case:
        return Case(f"{label}: {what}", ours / MIB, peer / MIB, "MiB", MEMORY_GOAL, two_sided=True)

    yield memory("peak memory", planned.memory.peak, found["peak"])
    seconds = planned.time.total, found["seconds"]
    yield Case(f"{label}: step, {clock} clock", *seconds, "s", TIME_GOAL, two_sided=True)
    kinds = {**planned.memory.at_rest, "activations": planned.memory.activations}
    for kind, size in found["kinds"].items():
        if size:
            yield memory(kind, kinds[kind], size)


def _start(config: RunConfig, ranks: int, threads: int, clock: str, folder: Path) -> dict[str, Any]:
    """Start the ranks; returns what rank 0 wrote.

    Raises:
        UserError: A rank failed; the text is the end of what it said.
    """
    settings, out = folder / "run.json", folder / "found.json"
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    rank = [sys.executable, "-W", "ignore", "-m", "benchmark.plan", str(settings), str(out), clock]
    # The ranks find this package beside the tools, and whatever else this process was told to find.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *launcher, *rank], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode or not out.exists():
        raise UserError(f"the training that the plan is held against failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _write_images(folder: Path) -> Path:
    """A dataset of noise images of 256 pixels with object and text regions, 3 to 1; returns its folder."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "shard-00000") as writer:
        for index in range(SAMPLES):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            stream = io.BytesIO()
            Image.fromarray(pixels).resize((256, 256)).save(stream, "JPEG")
            regions = tuple(_region(rng, place) for place in range(REGIONS))
            writer.add(f"sample{index:04d}", stream.getvalue(), SampleRecord(256, 256, regions))
    write_dataset(folder, [writer.entry], OBJECT_CLASSES, TEXT_CLASSES)
    return folder


def _region(rng: np.random.Generator, place: int) -> RegionRecord:
    x, y = (float(value) for value in rng.uniform(64, 128, 2))
    box = (x, y, x + 64, y + 64)
    if place % 4 == 0:
        tokens = tuple(int(token) for token in rng.choice(TEXT_CLASSES, 3, replace=False))
        return RegionRecord(kind="text", box=box, tokens=tokens, text="word", score=0.9)
    return RegionRecord(kind="object", box=box, label=int(rng.integers(OBJECT_CLASSES)), score=0.8)


# One rank.


def main() -> int:
    """Probe, train, write; arguments: the run's settings, the file to write, the clock."""
    import deepspeed  # noqa: F401  # loaded before memory is looked at: it is no part of any plan

    config: RunConfig = config_from_dict(json.loads(Path(sys.argv[1]).read_text()))
    place = topology.join(config.parallel.tensor)
    found = _train(config, place, Stopwatch(place.device, sys.argv[3] == "processor"))
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
    topology.leave()
    return 0


def _train(config: RunConfig, place: topology.Topology, watch: Stopwatch) -> dict[str, Any]:
    """Take the run's steps, with a round of probes before each; the first is left out of the times.

    Gives rates, the median seconds of a step, the peak beyond what the process had, and bytes by kind.
    """
    from megaregion.training.metrics import open_log
    from megaregion.training.trainer import Trainer

    # From the first tensor on: what has been freed amid what is kept would count as memory in use.
    return_freed_memory()
    memory, probes = PeakMemory(place.device), _probes(config, place.world_group)
    taken: dict[str, list[float]] = defaultdict(list)

    def time_together(name: str, work: Work) -> None:
        dist.barrier(place.world_group)
        taken[name].append(watch.seconds(work))

    for _, work in probes.values():
        # What comes first pays for what is made once.
        work()
    return_freed_memory()
    before = memory.now()
    open_log(Path(config.output) / config.name / "logs", place.rank)
    trainer = Trainer(config, place, StopRequest())
    batches = trainer.batches()
    try:
        trainer.train_step(batches)
        return_freed_memory()
        peak = memory.of(lambda: trainer.train_step(batches)) - before
        batch = next(batches)
        kinds = state_bytes(trainer.engine, trainer.heads.by_kind.values())
        _, kinds["activations"] = run_and_count(
            trainer.engine.parameters.values(), lambda: trainer.encode(batch)
        )
        keep_freed_memory()
        for _ in range(config.train.steps):
            for name, (_, work) in probes.items():
                time_together(name, work)
            time_together("step", lambda: trainer.train_step(batches))
    finally:
        trainer.loader.close()
    seconds = statistics.median(taken.pop("step")[1:])
    return {"rates": _rates(probes, taken), "seconds": seconds, "peak": peak, "kinds": kinds}


def _probes(config: RunConfig, group: Any) -> dict[str, tuple[float, Work]]:
    """What a rank does to find its rates while all ranks do it: operations or bytes, and the work."""
    square = torch.randn(MATRIX, MATRIX)
    elements, _ = body_parameters(config.model, config.head.embedding_dim)
    bucket = torch.ones(min(REDUCE_BUCKET, elements))
    added = torch.ones_like(bucket)
    probes: dict[str, tuple[float, Work]] = {
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
        probes["reduce"] = (2 * sent, lambda: dist.all_reduce(bucket, group=group))
        probes["gather"] = (sent, lambda: dist.all_gather_into_tensor(bucket, own, group=group))
        probes["latency"] = (1, lambda: dist.all_reduce(small, group=group))
    return probes


def _rates(probes: dict[str, tuple[float, Work]], taken: dict[str, list[float]]) -> dict[str, float]:
    """Medians of all rounds, under the names of ``Hardware``'s fields."""
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    rate = {name: amount / seconds[name] for name, (amount, _) in probes.items()}
    found = {
        "matrix_tflops": rate["matrix"] / 1e12,
        "linear_share": rate["linears"] / rate["matrix"],
        "attention_share": rate["attention"] / rate["matrix"],
        "memory_gbytes": rate["passes"] / 1e9,
        "stream_gbytes": rate["stream"] / 1e9,
    }
    if "reduce" in rate:
        # As ZeRO sends: gradients by all-reduce, parameters by gather, at which gloo is slower.
        sent = probes["reduce"][0] + probes["gather"][0]
        found["inside_gbytes"] = sent / (seconds["reduce"] + seconds["gather"]) / 1e9
        found["latency_us"] = seconds["latency"] * 1e6
    return found


def _linears(config: RunConfig) -> tuple[float, Work]:
    """A block's four linears, forward and backward."""
    model = config.model
    width, tokens = model.width, config.train.micro_batch * model.tokens
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
    length = model.tokens
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
    length = model.tokens
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
    run(main, teardown=False)
