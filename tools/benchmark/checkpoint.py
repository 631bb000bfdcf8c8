"""What an asynchronous save takes from training, beside a synchronous one, on the path by which a run saves.

Ratios are synchronous save / ours; a ratio of 20 is 5 percent of its time. The call blocks until the
state is copied to host memory, or, synchronous, until it is on the disk. While a thread then hashes and
writes, it uses a processor and the memory's bandwidth, which slows the steps where no core is idle; a
GPU's steps hardly need the processor, those of this benchmark's stand-in for a step need nothing else.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmark.measure import Stopwatch, alone, describe_host
from benchmark.report import Case, Report
from megaregion.checkpoint.fence import Fence
from megaregion.checkpoint.format import Piece, step_folder
from megaregion.checkpoint.saver import Retention, Save, Saver, Snapshot
from megaregion.command_line import path, whole
from megaregion.errors import UserError
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.schemas.run import Events

GOAL = 20.0
"""Least ratio of the synchronous save's time to what the asynchronous one blocks: at most 5%."""
ROW = 1024
"""Width of the state's matrices."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    parser.add_argument(
        "--parameters",
        type=whole(1024, 10**12),
        default=300_000_000,
        help="parameters of the model; the state is 12 bytes for each, and memory and disk hold it twice",
    )
    parser.add_argument("--folder", type=path, default=Path(), help="folder on the disk to measure")
    parser.add_argument("--repeats", type=whole(), default=2, help="saves of each kind; the fastest counts")


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Save a state of that size both ways.

    Raises:
        UserError: The disk has too little room.
    """
    needed, free = 24 * options.parameters, shutil.disk_usage(options.folder).free
    if free < needed:
        raise UserError(f"--folder {options.folder} needs {needed / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    report = Report(describe_host(device, folder=str(options.folder)))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as folder:
        report.cases += _compare(options.parameters, Path(folder), alone(device), options.repeats)
    topology.leave()
    return report


def _compare(parameters: int, folder: Path, place: Topology, repeats: int) -> list[Case]:
    """Save the same state both ways, in turn; the first save of each kind stands apart."""
    pieces = _training_state(parameters, place.device)
    size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces) / 1e9
    saver = Saver(place, Fence(folder, 0, "benchmark"), Events(folder, False), Retention(last=1))
    snapshot, steps = Snapshot(place.device), Steps(place.device)
    facts = {"step": 0, "position": 0}
    synchronous, blocked, slowed, written = [], [], [], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        host = [replace(piece, tensor=piece.tensor.cpu()) for piece in pieces]
        _start(saver, folder, host, facts)
        _finish(saver, folder)
        synchronous.append(time.perf_counter() - began)
        del host
        began = time.perf_counter()
        _start(saver, folder, snapshot.take(pieces), facts)
        blocked.append(time.perf_counter() - began)
        slowed.append(steps.lost_until(saver.done))
        written.append(time.perf_counter() - began)
        _finish(saver, folder)
    name, peer = f"save {parameters / 1e6:.0f}M parameters, {size:.1f} GB", min(synchronous[1:])
    return [
        Case(f"{name}: the call blocks", min(blocked[1:]), peer, GOAL, "s"),
        Case(f"{name}: the run's first call blocks", blocked[0], peer, 0, "s"),
        Case(f"{name}: steps slowed meanwhile", min(slowed[1:]), peer, 0, "s"),
        Case(f"{name}: until it is visible", min(written[1:]), peer, 0, "s"),
    ]


def _training_state(parameters: int, device: torch.device) -> list[Piece]:
    """Weights and two moments in fp32, as matrices of the size that a ViT-L has."""
    pieces = []
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for index, first in enumerate(range(0, parameters, 4096 * ROW)):
            rows = max(1, min(4096, (parameters - first) // ROW))
            tensor = torch.full((rows, ROW), float(index + 1), device=device)
            pieces.append(Piece(f"{kind}.{index}", tuple(tensor.shape), (0, 0), tensor))
    return pieces


class Steps:
    """A stand-in for training: matrix products of one size, timed one by one."""

    def __init__(self, device: torch.device) -> None:
        self._operand = torch.ones(768, 768, device=device)
        self._watch = Stopwatch(device)
        self._alone = self._watch.fastest(self._step, 10)

    def lost_until(self, ended: Callable[[], bool]) -> float:
        """Take steps until something has ended; returns the seconds by which they took longer than alone."""
        lost = 0.0
        while not ended():
            lost += self._watch.seconds(self._step) - self._alone
        return max(0.0, lost)

    def _step(self) -> Tensor:
        out = self._operand
        for _ in range(4):
            out = out @ self._operand
        return out


def _start(saver: Saver, folder: Path, pieces: list[Piece], facts: dict[str, int]) -> None:
    saver.prepare(folder, 0)
    saver.start(Save(folder, 0, pieces, facts))


def _finish(saver: Saver, folder: Path) -> None:
    """Wait until the save is visible, then make room for the next."""
    if not saver.wait():
        raise UserError(f"--folder {folder.parent}: the save failed; is there room and a right to write?")
    shutil.rmtree(step_folder(folder, 0))
