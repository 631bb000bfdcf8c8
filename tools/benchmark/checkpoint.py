"""What an asynchronous save takes from training, beside a synchronous one."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmark.measure import Stopwatch, alone, passing_folder
from benchmark.part import FOLDER, Case, part
from megaregion.bounds import PositiveInt, Whole
from megaregion.checkpoint.fence import Fence
from megaregion.checkpoint.format import Piece, step_folder
from megaregion.checkpoint.saver import Retention, Save, Saver, Snapshot
from megaregion.errors import UserError
from megaregion.parallel import topology
from megaregion.schemas.run import Events

GOAL = 20.0
"""Least ratio of the synchronous save's time to what the asynchronous one blocks: at most 5%."""
TOLD = "the run's first call blocks", "steps slowed meanwhile", "until it is visible"
ROW = 1024
"""Width of the state's matrices."""


@part(
    ("--parameters", Whole(1024, 10**12), 300_000_000, 
     "parameters of the model; the state is 12 bytes for each, and memory and disk hold it twice"),
    FOLDER,
    ("--repeats", PositiveInt, 2, "saves of each kind; the fastest counts"),
)  # fmt: skip
def checkpoint(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """What an asynchronous save takes from training, beside a synchronous one, on the path of a run's saves.

    Ratios are synchronous save / ours; a ratio of 20 is 5 percent of its time. The call blocks until the
    state is copied to host memory, or, synchronous, until it is on the disk. While a thread then hashes and
    writes, it uses a processor and the memory's bandwidth, which slows the steps where no core is idle; a
    GPU's steps hardly need the processor, those of this benchmark's stand-in for a step need nothing else.
    """
    with passing_folder(options.folder, 24 * options.parameters) as folder:
        pieces = _training_state(options.parameters, watch.device)
        size = sum(piece.tensor.nbytes for piece in pieces) / 1e9
        name = f"save {options.parameters / 1e6:.0f}M parameters, {size:.1f} GB"
        if watch.counts:
            snapshot = Snapshot(watch.device)
            found = watch.fastest({"copy to the host": lambda: snapshot.take(pieces)}, 1)["copy to the host"]
            yield Case(f"{name}: the call blocks", found, found, "s", GOAL)
            for told in TOLD:
                yield Case(f"{name}: {told}", 0, 0, "s", unmeasured="no bytes are there to write")
            return
        synchronous, blocked, slowed, written = _save(pieces, folder, options.repeats, watch)
    topology.leave()
    # The first save of each kind stands apart.
    peer = min(synchronous[1:])
    yield Case(f"{name}: the call blocks", min(blocked[1:]), peer, "s", GOAL)
    for told, seconds in zip(TOLD, (blocked[0], min(slowed[1:]), min(written[1:])), strict=True):
        yield Case(f"{name}: {told}", seconds, peer, "s")


def _save(pieces: list[Piece], folder: Path, repeats: int, watch: Stopwatch) -> tuple[list[float], ...]:
    """Save the same state both ways, in turn.

    Returns:
        Seconds of each synchronous save, and of each asynchronous one until it returned, by which it slowed
        steps, and until it was visible.
    """
    saver = Saver(
        alone(watch.device), Fence(folder, 0, "benchmark"), Events(folder, False), Retention(last=1)
    )
    snapshot = Snapshot(watch.device)
    synchronous, blocked, slowed, written = [], [], [], []
    operand = torch.ones(768, 768, device=watch.device)

    def step() -> Tensor:
        """A stand-in for training."""
        return torch.linalg.multi_dot([operand] * 5)

    undisturbed = watch.fastest({"": step}, 10)[""]

    def start(copied: list[Piece]) -> None:
        saver.prepare(folder, 0)
        saver.start(Save(folder, 0, copied, {"step": 0, "position": 0}))

    def wait() -> None:
        if not saver.wait():
            raise UserError(f"--folder {folder.parent}: the save failed; is there room and a right to write?")

    def save() -> None:
        start([replace(piece, tensor=piece.tensor.cpu()) for piece in pieces])
        wait()

    for _ in range(repeats + 1):
        synchronous.append(watch.seconds(save))
        shutil.rmtree(step_folder(folder, 0))
        began = time.perf_counter()
        start(snapshot.take(pieces))
        blocked.append(time.perf_counter() - began)
        lost = 0.0
        while not saver.done():
            lost += watch.seconds(step) - undisturbed
        slowed.append(max(0.0, lost))
        written.append(time.perf_counter() - began)
        wait()
        shutil.rmtree(step_folder(folder, 0))
    return synchronous, blocked, slowed, written


def _training_state(parameters: int, device: torch.device) -> list[Piece]:
    """Weights and two moments in fp32, as matrices of the size that a ViT-L has."""
    pieces = []
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for index, first in enumerate(range(0, parameters, 4096 * ROW)):
            rows = max(1, min(4096, (parameters - first) // ROW))
            tensor = torch.full((rows, ROW), float(index + 1), device=device)
            pieces.append(Piece(f"{kind}.{index}", tuple(tensor.shape), (0, 0), tensor))
    return pieces
