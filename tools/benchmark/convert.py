"""Time and memory of turning a large checkpoint into a HuggingFace folder and back."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmark.measure import Stopwatch, passing_folder
from benchmark.part import FOLDER, Case, part
from megaregion.bounds import Choice, Whole
from megaregion.checkpoint.format import Piece, publish, step_folder, write_pieces
from megaregion.config import ModelConfig, RunConfig
from megaregion.models import RegionEncoder

SHAPES = {
    "B/16": ModelConfig(),
    "L/14": ModelConfig(patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096),
    "H/14": ModelConfig(patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120),
}
"""Encoders by name."""
LIMIT_SECONDS, LIMIT_MEGABYTES = 60.0, 3000.0
"""What the conversion of an L/14 may take."""
DISK = 20e9
"""Bytes of disk that the largest shape needs."""
TOOL = Path(__file__).parents[1] / "convert_checkpoint.py"


@part(
    ("--shape", Choice((*SHAPES,)), "L/14", "which encoder"),
    ("--ranks", Whole(1, 4096), 8, "ranks that wrote the checkpoint"),
    FOLDER,
)
def convert(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """Time and memory of turning a large checkpoint into a HuggingFace folder and back.

    Peers are the limits (60 s and 3 GB for an L/14): a ratio of 2 is half of what is allowed. The checkpoint
    has the tensors of a real one, moments included, in as many files as ranks; the real command runs in a
    process of its own, so its memory is that of a user's whole process, torch and all.
    """
    with passing_folder(options.folder, DISK) as folder:
        yield from measure_conversion(folder, options.shape, SHAPES[options.shape], options.ranks)


def measure_conversion(folder: Path, name: str, config: ModelConfig, ranks: int) -> Iterator[Case]:
    """Convert one checkpoint to fp32 and to bf16, and the fp32 folder to a starting checkpoint.

    Args:
        folder: An empty folder on the disk to measure.
        name: What the encoder is called; L/14 has goals.
        config: The encoder.
        ranks: Ranks that wrote the checkpoint.
    """
    size = _write_checkpoint(folder / "run", config, ranks)
    written = f"{name} checkpoint, {size / 1e9:.1f} GB of {ranks} ranks"
    goal = float(name == "L/14")
    for label, *command in (
        (f"{written}, to-hf fp32", "to-hf", folder / "run", folder / "fp32", "--dtype", "fp32"),
        (f"{written}, to-hf bf16", "to-hf", folder / "run", folder / "bf16", "--dtype", "bf16"),
        (f"{name} from-hf", "from-hf", folder / "fp32", folder / "start"),
    ):
        seconds, megabytes = _run(map(str, command))
        yield Case(f"{label}: time, peer: the limit", seconds, LIMIT_SECONDS, "s", goal)
        yield Case(f"{label}: memory, peer: the limit", megabytes, LIMIT_MEGABYTES, "MB", goal)


def _write_checkpoint(folder: Path, config: ModelConfig, ranks: int) -> int:
    """Write a run with one checkpoint of random weights and moments; returns its bytes."""
    unfinished = folder / "checkpoints" / "step-00000001.unfinished"
    unfinished.mkdir(parents=True)
    run = RunConfig(name="benchmark", model=config)
    with torch.device("meta"):
        model = RegionEncoder(config, run.head.embedding_dim)
    tensors = [
        (f"body.{kind}.{name}", parameter.shape)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, parameter in model.named_parameters()
    ]
    for rank in range(ranks):
        # Whole tensors in turn, as data-parallel ranks write them.
        generator = torch.Generator().manual_seed(rank)
        drawn = (
            Piece(key, tuple(shape), (0,) * len(shape), torch.rand(shape, generator=generator))
            for key, shape in tensors[rank::ranks]
        )
        write_pieces(unfinished, rank, drawn)
    facts = {"step": 1, "position": 0, "config": dataclasses.asdict(run), "dataset": {}}
    publish(unfinished, step_folder(folder / "checkpoints", 1), facts)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _run(command: Iterator[str]) -> tuple[float, float]:
    """Seconds and greatest resident megabytes of the command, in a process of its own."""
    words = [sys.executable, str(TOOL), *command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    began = time.perf_counter()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * 1024 / 1e6
