"""The planner's benchmark: a plan for this machine beside real training steps on it, in one run.

Every rank first probes what the machine gives while all ranks ask for it; from these rates alone, and from
the config, the plan is made. Then the same ranks train, through the same engine as any run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmark.plan_probe import settings_file
from benchmark.report import Case
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

OBJECT_CLASSES, TEXT_CLASSES = 20_000, 2_000
SAMPLES, REGIONS = 64, 12
TOOLS = Path(__file__).parents[1]
MEMORY_GOAL, TIME_GOAL = 1 / 1.05, 1 / 1.15
"""The plan within 5% and within 15%."""
MODELS = {
    "s16": ModelConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "b16": ModelConfig(),
}


def training_run(
    model: ModelConfig, ranks: int, tensor: int, zero_stage: int, recompute: bool, batch: int, steps: int
) -> RunConfig:
    """A run in fp32 with two micro-steps a step, as the benchmark trains it."""
    return RunConfig(
        name="plan",
        model=model,
        data=DataConfig(workers=0, regions_per_image=10),
        head=HeadsConfig(
            embedding_dim=model.width, object=HeadConfig(sample_rate=0.1), text=HeadConfig(sample_rate=1.0)
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        parallel=ParallelConfig(tensor=tensor, zero_stage=zero_stage),
        train=TrainConfig(
            steps=steps,
            global_batch=2 * batch * ranks // tensor,
            micro_batch=batch,
            precision="fp32",
            recompute=recompute,
            watchdog_seconds=0,
        ),
        checkpoint=CheckpointConfig(every=1_000_000),
    )


def compare_plan(config: RunConfig, ranks: int, threads: int, clock: str, folder: Path) -> list[Case]:
    """Plan and train one config on this machine.

    Args:
        config: The run; paths are set here.
        ranks: Processes.
        threads: Threads of each.
        clock: wall or processor.
        folder: An empty folder.
    """
    data = write_images(folder / "shards")
    config = dataclasses.replace(
        config, output=str(folder / "runs"), data=dataclasses.replace(config.data, path=str(data))
    )
    found = _measure(config, ranks, threads, clock, folder)
    plan = make_plan(config, _hardware(found["rates"], ranks), Labels(OBJECT_CLASSES, TEXT_CLASSES, 0.25))
    return _cases(config, ranks, clock, plan, found)


def _cases(config: RunConfig, ranks: int, clock: str, plan: Plan, found: dict[str, Any]) -> list[Case]:
    label = f"{ranks} ranks" if ranks > 1 else "1 rank"
    label += f", tensor {config.parallel.tensor}" if config.parallel.tensor > 1 else ""
    label += f", ZeRO {config.parallel.zero_stage}{', recompute' if config.train.recompute else ''}"
    mib = 2**20
    cases = [
        Case(f"{label}: peak memory", plan.memory.peak / mib, found["peak"] / mib, MEMORY_GOAL, "MiB", True),
        Case(f"{label}: step, {clock} clock", plan.time.total, found["seconds"], TIME_GOAL, "s", True),
    ]
    planned = {**plan.memory.at_rest, "activations": plan.memory.activations}
    return cases + [
        Case(f"{label}: {kind}", planned[kind] / mib, size / mib, MEMORY_GOAL, "MiB", True)
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


def _measure(config: RunConfig, ranks: int, threads: int, clock: str, folder: Path) -> dict[str, Any]:
    """Start the ranks; returns what rank 0 wrote.

    Raises:
        UserError: A rank failed; the text is the end of what it said.
    """
    settings, out = settings_file(config, folder / "run.json"), folder / "found.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
    rank = [sys.executable, "-W", "ignore", "-m", "benchmark.plan_probe", str(settings), str(out), clock]
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


def write_images(folder: Path) -> Path:
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
