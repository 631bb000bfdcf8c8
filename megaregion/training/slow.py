"""Which ranks are slower than the others: each rank's own time, without what it waits for the rest.

Own time is the wait for data and the forward pass. Where the forward pass has collectives inside (tensor
parallelism, ZeRO 3), ranks wait in it for each other: on a processor the thread's own processor time is taken
then; on a GPU a slow rank shows as the group of ranks that share its model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaregion.parallel.topology import Topology

LEAST_SHARE = 0.05
"""Share of a step that a rank must lose to be called slow; jitter of short steps is no news."""


@dataclass(frozen=True)
class RankTimes:
    """What one rank says of the steps since the last log line."""

    own: float = 0.0
    """Seconds of waiting for data and of its own forward passes."""
    data: float = 0.0
    """Seconds of these that went to waiting for data."""
    bad: int = 0
    """Samples replaced; counted once for the ranks that share a model."""
    seconds: float = 0.0
    """Length of the steps."""

    def plus(self, own: float, data: float, bad: int, seconds: float) -> RankTimes:
        """With one more step."""
        return RankTimes(self.own + own, self.data + data, self.bad + bad, self.seconds + seconds)


class OwnTime:
    """Adds up the forward passes of this rank."""

    def __init__(self, device: torch.device, waits_inside: bool) -> None:
        """Start at 0.

        Args:
            device: Where the forward pass runs.
            waits_inside: Whether the forward pass has collectives.
        """
        self._device = device
        self._clock = time.thread_time if waits_inside else time.perf_counter
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward pass; on a GPU it only marks the queue."""
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            began = self._clock()
            yield
            self._seconds += self._clock() - began

    def take(self) -> float:
        """Seconds since the last call; on a GPU its queue has to be past the marks."""
        seconds = self._seconds + sum(first.elapsed_time(last) / 1e3 for first, last in self._events)
        self._seconds = 0.0
        self._events.clear()
        return seconds


def gather_times(own: RankTimes, topology: Topology) -> list[RankTimes]:
    """The times of all ranks, in rank order; a collective."""
    told = torch.tensor([own.own, own.data, own.bad, own.seconds], dtype=torch.float64)
    told = told.to(topology.device)
    gathered = told.new_empty(topology.world_size * len(told))
    dist.all_gather_single(gathered, told, group=topology.world_group)
    rows = gathered.view(topology.world_size, len(told)).tolist()
    return [RankTimes(mine, data, int(bad), seconds) for mine, data, bad, seconds in rows]


def slow_ranks(times: Sequence[RankTimes], factor: float) -> dict[int, float]:
    """Ranks slower than the median, with how many times slower they are.

    Args:
        times: All ranks' times.
        factor: How many times the median a rank may take; 0 finds nothing.
    """
    if factor == 0:
        return {}
    usual = statistics.median(rank.own for rank in times)
    return {
        number: rank.own / max(usual, 1e-9)
        for number, rank in enumerate(times)
        if rank.own > factor * usual and rank.own - usual > LEAST_SHARE * rank.seconds
    }
