"""Time and memory of turning a large checkpoint into a HuggingFace folder and back.

Peers are the limits (60 s and 3 GB for an L/14): a ratio of 2 is half of what is allowed. The checkpoint
has the tensors of a real one, moments included, in as many files as ranks; the real command runs in a
process of its own, so its memory is that of a user's whole process, torch and all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmark.measure import describe_host
from benchmark.report import Case, Report
from megaregion.checkpoint.format import Piece, publish, step_folder, write_pieces
from megaregion.command_line import path, whole
from megaregion.config import ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.models import RegionEncoder

SHAPES = {
    "B/16": ModelConfig(),
    "L/14": ModelConfig(patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096),
    "H/14": ModelConfig(patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120),
}
"""Encoders by name."""
LIMIT_SECONDS = 60.0
LIMIT_BYTES = 3e9
"""What the conversion of an L/14 may take."""
DISK = 20e9
"""Bytes of disk that the largest shape needs."""
TOOL = Path(__file__).parents[1] / "convert_checkpoint.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument("--shape", choices=list(SHAPES), default="L/14", help="which encoder")
    parser.add_argument("--ranks", type=whole(1, 4096), default=8, help="ranks that wrote the checkpoint")
    parser.add_argument("--folder", type=path, default=Path(), help="folder on the disk to measure")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Write a checkpoint of that shape and convert it.

    Raises:
        UserError: The disk has too little room.
    """
    free = shutil.disk_usage(options.folder).free
    if free < DISK:
        raise UserError(f"--folder {options.folder} needs {DISK / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    report = Report(describe_host(device, folder=str(options.folder)))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as folder:
        threads = options.threads or torch.get_num_threads()
        config = SHAPES[options.shape]
        report.cases += measure_conversion(Path(folder), options.shape, config, options.ranks, threads)
    return report


def measure_conversion(folder: Path, name: str, config: ModelConfig, ranks: int, threads: int) -> list[Case]:
    """Convert one checkpoint to fp32 and to bf16, and the fp32 folder to a starting checkpoint.

    Args:
        folder: An empty folder on the disk to measure.
        name: What the encoder is called; L/14 has goals.
        config: The encoder.
        ranks: Ranks that wrote the checkpoint.
        threads: Threads of the command.
    """
    size = _write_checkpoint(folder / "run", config, ranks)
    written = f"{name} checkpoint, {size / 1e9:.1f} GB of {ranks} ranks"
    goal, cases = float(name == "L/14"), []
    for label, arguments in (
        (f"{written}, to-hf fp32", ["to-hf", folder / "run", folder / "fp32", "--dtype", "fp32"]),
        (f"{written}, to-hf bf16", ["to-hf", folder / "run", folder / "bf16", "--dtype", "bf16"]),
        (f"{name} from-hf", ["from-hf", folder / "fp32", folder / "start"]),
    ):
        seconds, peak = _run([str(argument) for argument in arguments], threads)
        cases.append(Case(f"{label}: time, peer: the limit", seconds, LIMIT_SECONDS, goal, "s"))
        cases.append(Case(f"{label}: memory, peer: the limit", peak / 1e6, LIMIT_BYTES / 1e6, goal, "MB"))
    return cases


def _write_checkpoint(folder: Path, config: ModelConfig, ranks: int) -> int:
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
