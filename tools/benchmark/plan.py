"""The planner's memory and step time beside real training on this machine.

Ours is the plan, made from the config and from rates that the same run measures first, every rank while
the others do; peer is what training took, through the same engine as any run. Ratios are measured /
planned, and must not miss the goal either way. With the processor's clock, a rank's own time on one
thread counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmark.measure import add_clock, describe_host
from benchmark.report import Case, Report
from megaregion.command_line import whole
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
from megaregion.errors import UserError
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import Labels
from megaregion.planning.plan import Plan, make_plan

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
}
OBJECT_CLASSES, TEXT_CLASSES = 20_000, 2_000
SAMPLES, REGIONS = 64, 12
MEMORY_GOAL, TIME_GOAL = 1 / 1.05, 1 / 1.15
"""The plan within 5% and within 15%."""
MIB = 2**20
TOOLS = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--case", choices=[*CASES, "all"], nargs="+", default=["1", "2"], help="ranks and what is special")
    add("--model", choices=list(MODELS), default="b16", help="ViT that is trained, at 224 pixels")
    add("--batch", type=whole(), default=4, help="images of a micro-step and rank")
    add("--steps", type=whole(2), default=4, help="timed training steps, the first left out")
    add_clock(parser)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Plan and train each case.

    Raises:
        UserError: A flag is out of range, or training failed.
    """
    if device.type != "cpu":
        raise UserError("benchmark.py plan measures processors only so far; use --device cpu")
    cores = 1 if options.clock == "processor" else options.threads or os.cpu_count() or 1
    report = Report(describe_host(device))
    for name in CASES if "all" in options.case else options.case:
        ranks, parallel, recompute = CASES[name]
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            config = _training_run(options, ranks, parallel, recompute, Path(folder))
            found = _train(config, ranks, max(1, cores // ranks), options.clock, Path(folder))
        plan = make_plan(config, _hardware(found["rates"], ranks), Labels(OBJECT_CLASSES, TEXT_CLASSES, 0.25))
        report.cases += _compare(plan, found, options.clock)
    return report


def _training_run(
    options: argparse.Namespace, ranks: int, parallel: ParallelConfig, recompute: bool, folder: Path
) -> RunConfig:
    """A run in fp32 with two micro-steps a step, on images that are written into the folder."""
    model = MODELS[options.model]
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


def _compare(plan: Plan, found: dict[str, Any], clock: str) -> list[Case]:
    parallel, ranks = plan.layout.config.parallel, plan.layout.ranks
    label = f"{ranks} ranks" if ranks > 1 else "1 rank"
    label += f", tensor {parallel.tensor}" if parallel.tensor > 1 else ""
    label += f", ZeRO {parallel.zero_stage}{', recompute' if plan.layout.config.train.recompute else ''}"
    cases = [
        Case(f"{label}: peak memory", plan.memory.peak / MIB, found["peak"] / MIB, MEMORY_GOAL, "MiB", True),
        Case(f"{label}: step, {clock} clock", plan.time.total, found["seconds"], TIME_GOAL, "s", True),
    ]
    planned = {**plan.memory.at_rest, "activations": plan.memory.activations}
    return cases + [
        Case(f"{label}: {kind}", planned[kind] / MIB, size / MIB, MEMORY_GOAL, "MiB", True)
        for kind, size in found["kinds"].items()
        if size
    ]


def _hardware(rates: dict[str, float], ranks: int) -> Hardware:
    """This machine, as the ranks found it; nothing waits for kernels, and nothing is saved."""
    return Hardware(
        name="this machine",
        device="processor",
        gpus=ranks,
        gpus_per_node=ranks,
        launch_us=0.0,
        **{"latency_us": 0.0, **rates},
    )


def _train(config: RunConfig, ranks: int, threads: int, clock: str, folder: Path) -> dict[str, Any]:
    """Start the ranks; returns what rank 0 wrote.

    Raises:
        UserError: A rank failed; the text is the end of what it said.
    """
    settings, out = folder / "run.json", folder / "found.json"
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    rank = [sys.executable, "-W", "ignore", "-m", "benchmark.plan_rank", str(settings), str(out), clock]
    # The ranks find this package beside the tools, and whatever else this process was told to find.
    paths = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
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
