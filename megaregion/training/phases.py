"""Where a rank's step goes: data, forward, head, backward, communication, optimizer, save.

    step   data | forward | head | backward (communication inside is taken out) | optimizer ...
On a GPU the marks lie in its queue, so times are the queue's; the host never waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaregion.parallel.topology import Topology

PHASES = ("data", "forward", "head", "backward", "communication", "optimizer", "save")
"""communication is what a rank waits for others outside of forward, head and backward: gradients reduced
behind the backward pass, and the agreement on the step. What overlaps with computing costs nothing."""


class Phases:
    """Seconds of each phase since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []
        self._open: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Around a phase; one inside another takes its time from it."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else None)

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; a GPU's queue has to be past the last mark."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, began), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds[name] += _between(began, ended)
        self._marks.clear()
        return seconds

    def _mark(self, name: str | None) -> None:
        if not self._on_gpu:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))


def _between(began: float | torch.cuda.Event, ended: float | torch.cuda.Event) -> float:
    if isinstance(began, float):
        assert isinstance(ended, float)
        return ended - began
    return float(began.elapsed_time(ended)) / 1e3  # type: ignore[arg-type]


@dataclass(frozen=True)
class Split:
    """The phases of all ranks over the steps since the last log line."""

    by_rank: tuple[dict[str, float], ...]
    """Seconds of each phase, in rank order."""

    def mean(self) -> dict[str, float]:
        """Mean seconds of each phase over the ranks."""
        return {name: sum(rank[name] for rank in self.by_rank) / len(self.by_rank) for name in PHASES}

    def slowest(self) -> dict[str, int]:
        """The rank that spent most time in each phase; phases without time have none."""
        ranks = range(len(self.by_rank))
        found = {name: max(ranks, key=lambda rank: self.by_rank[rank][name]) for name in PHASES}
        return {name: rank for name, rank in found.items() if self.by_rank[rank][name] > 0}

    def rounded(self) -> list[dict[str, float]]:
        """By rank, to milliseconds, as metrics.jsonl keeps them."""
        return [{name: round(seconds, 3) for name, seconds in rank.items()} for rank in self.by_rank]

    def table(self, hosts: Sequence[str]) -> str:
        """Aligned text: mean share of each phase, and the slowest rank with its host."""
        total = sum(self.mean().values()) or 1.0
        slowest = self.slowest()
        lines = [f"{'phase':<14}{'seconds':>9}{'share':>8}   slowest rank"]
        for name, seconds in self.mean().items():
            rank = slowest.get(name)
            who = "" if rank is None else f"   {rank} on {hosts[rank]}: {self.by_rank[rank][name]:.3f} s"
            lines.append(f"{name:<14}{seconds:>9.3f}{seconds / total:>8.1%}{who}")
        return "\n".join(lines)


def gather_phases(own: dict[str, float], topology: Topology) -> Split:
    """The phases of all ranks; a collective."""
    told = torch.tensor([own[name] for name in PHASES], dtype=torch.float64).to(topology.device)
    gathered = told.new_empty(topology.world_size * len(PHASES))
    dist.all_gather_single(gathered, told, group=topology.world_group)
    rows = gathered.view(topology.world_size, len(PHASES)).tolist()
    return Split(tuple(dict(zip(PHASES, row, strict=True)) for row in rows))
