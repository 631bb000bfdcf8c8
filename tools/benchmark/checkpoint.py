"""What a save takes from training: asynchronous against synchronous, on the path that a run saves by.

Two things are taken, and they are reported apart. The call blocks until the state is copied to host memory
(asynchronous) or until it is on the disk (synchronous). While the thread then hashes and writes, it uses a
processor and the memory's bandwidth, which slows the steps meanwhile where no core is idle; a GPU's steps
hardly need the processor, those of this benchmark's stand-in for a step need nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmark.measure import Stopwatch
from benchmark.report import Case
from megaregion.checkpoint.fence import Fence
from megaregion.checkpoint.format import Piece, step_folder
from megaregion.checkpoint.saver import Retention, Save, Saver, Snapshot
from megaregion.errors import UserError
from megaregion.parallel.topology import Topology
from megaregion.schemas.events import Events

GOAL = 20.0
"""Least ratio of the synchronous save's time to what the asynchronous one blocks: at most 5%."""

ROW = 1024
"""Width of the state's matrices."""


def training_state(parameters: int, device: torch.device) -> list[Piece]:
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
        self.alone = min(self.seconds() for _ in range(10))
        """Seconds of a step while nothing is written."""

    def seconds(self) -> float:
        """Take one step."""
        return self._watch.seconds(self._step)

    def _step(self) -> Tensor:
        out = self._operand
        for _ in range(4):
            out = out @ self._operand
        return out

    def lost_until(self, ended: Callable[[], bool]) -> float:
        """Take steps until something has ended; returns the seconds by which they took longer than alone."""
        lost = 0.0
        while not ended():
            lost += self.seconds() - self.alone
        return max(0.0, lost)


def compare_saves(
    parameters: int, folder: Path, topology: Topology, device: torch.device, repeats: int
) -> list[Case]:
    """Save the same state both ways, in turn.

    Args:
        parameters: Parameters of the model; the state has three fp32 values for each.
        folder: Where to write; emptied.
        topology: A single rank.
        device: Where the state lies.
        repeats: Saves of each kind; the fastest of each counts.
    """
    pieces = training_state(parameters, device)
    size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in pieces) / 1e9
    saver = Saver(topology, Fence(folder, 0, "benchmark"), Events(folder, False), Retention(last=1))
    snapshot, steps = Snapshot(device), Steps(device)
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


def _start(saver: Saver, folder: Path, pieces: list[Piece], facts: dict[str, int]) -> None:
    saver.prepare(folder, 0)
    saver.start(Save(folder, 0, pieces, facts))


def _finish(saver: Saver, folder: Path) -> None:
    """Wait until the save is visible, then make room for the next."""
    if not saver.wait():
        raise UserError(f"--folder {folder.parent}: the save failed; is there room and a right to write?")
    shutil.rmtree(step_folder(folder, 0))
