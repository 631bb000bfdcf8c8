"""What it takes to turn a large checkpoint into a HuggingFace folder: time and memory of the real command.

The checkpoint has the tensors of a real one, moments included, in as many files as ranks; the command runs
in a process of its own, so its memory is that of a user's whole process, torch and all.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmark.report import Case
from megaregion.checkpoint.format import Piece, step_folder
from megaregion.checkpoint.writer import publish, write_pieces
from megaregion.config import ModelConfig, RunConfig
from megaregion.models import RegionEncoder

SHAPES = {
    "B/16": ModelConfig(),
    "L/14": ModelConfig(patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096),
    "H/14": ModelConfig(patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120),
}
"""Encoders by name."""

GOAL_SECONDS = 60.0
GOAL_BYTES = 3e9
"""What the conversion of an L/14 may take."""

TOOL = Path(__file__).parents[1] / "convert_checkpoint.py"


def write_checkpoint(folder: Path, config: ModelConfig, ranks: int) -> int:
    """Write a run with one checkpoint of random weights and moments; returns its bytes."""
    unfinished = folder / "checkpoints" / "step-00000001.unfinished"
    unfinished.mkdir(parents=True)
    run = RunConfig(name="benchmark", model=config)
    with torch.device("meta"):
        model = RegionEncoder(config, run.head.embedding_dim)
    for rank in range(ranks):
        write_pieces(unfinished, rank, _pieces(model, rank, ranks))
    facts = {"step": 1, "position": 0, "config": dataclasses.asdict(run), "dataset": {}}
    publish(unfinished, step_folder(folder / "checkpoints", 1), facts)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _pieces(model: RegionEncoder, rank: int, ranks: int) -> Iterator[Piece]:
    """One rank's share: whole tensors in turn, as data-parallel ranks write them."""
    generator = torch.Generator().manual_seed(rank)
    tensors = [
        (f"body.{kind}.{name}", parameter.shape)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, parameter in model.named_parameters()
    ]
    for key, shape in tensors[rank::ranks]:
        yield Piece(key, tuple(shape), (0,) * len(shape), torch.rand(shape, generator=generator))


def measure_conversion(folder: Path, name: str, config: ModelConfig, ranks: int, threads: int) -> list[Case]:
    """Convert one checkpoint to fp32 and to bf16, and the fp32 folder to a starting checkpoint.

    Args:
        folder: An empty folder on the disk to measure.
        name: What the encoder is called; L/14 has goals.
        config: The encoder.
        ranks: Ranks that wrote the checkpoint.
        threads: Threads of the command.
    """
    size = write_checkpoint(folder / "run", config, ranks)
    goal = name == "L/14"
    cases = []
    for dtype in ("fp32", "bf16"):
        seconds, peak = _run(["to-hf", str(folder / "run"), str(folder / dtype), "--dtype", dtype], threads)
        label = f"{name} checkpoint, {size / 1e9:.1f} GB of {ranks} ranks, to-hf {dtype}"
        cases.append(Case(f"{label}: time, peer: the limit", seconds, GOAL_SECONDS, float(goal), "s"))
        cases.append(
            Case(f"{label}: memory, peer: the limit", peak / 1e6, GOAL_BYTES / 1e6, float(goal), "MB")
        )
    seconds, peak = _run(["from-hf", str(folder / "fp32"), str(folder / "start")], threads)
    cases.append(Case(f"{name} from-hf: time, peer: the limit", seconds, GOAL_SECONDS, float(goal), "s"))
    cases.append(
        Case(f"{name} from-hf: memory, peer: the limit", peak / 1e6, GOAL_BYTES / 1e6, float(goal), "MB")
    )
    return cases


def _run(arguments: list[str], threads: int) -> tuple[float, float]:
    """Seconds and greatest resident bytes of the command, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments], env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024.0
