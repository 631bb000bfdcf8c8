"""Time: of a call, of works that take turns, of works in processes of their own; and where it is taken."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from benchmark.memory import PeakMemory
from megaregion.errors import UserError
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology

T = TypeVar("T")
Work = Callable[[], object]
"""One step; it leaves everything as the next step wants it."""
Build = Callable[[], Work]
"""Makes the work; a function of a module, with its arguments, for a new process finds it by its name."""


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on one device."""

    device: torch.device
    processor: bool = False
    """Count the processors' time in this process and in those that it has ended, instead of the wall's: on a
    machine that others use at the same time, with one thread, it is what the wall clock would show if they
    did not."""

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """What a call gives, and its seconds, a GPU's queue included."""
        began = self._now()
        found = work()
        return found, self._now() - began

    def seconds(self, work: Work) -> float:
        """Seconds of one call."""
        return self.timed(work)[1]

    def fastest(self, works: Mapping[str, Work], rounds: int, left_out: int = 1) -> dict[str, float]:
        """Seconds of each work's fastest call; they take turns."""
        return _take_turns(
            {name: partial(self.seconds, work) for name, work in works.items()}, rounds, left_out
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if not self.processor:
            return time.perf_counter()
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime


def _take_turns(times: Mapping[str, Callable[[], float]], rounds: int, left_out: int = 1) -> dict[str, float]:
    """The least of each; a machine that slows down in the middle slows all, and first rounds are left out."""
    taken: dict[str, list[float]] = {name: [] for name in times}
    for _ in range(left_out + rounds):
        for name, time_of in times.items():
            taken[name].append(time_of())
    return {name: min(each[left_out:]) for name, each in taken.items()}


def race(
    builds: Mapping[str, Build], watch: Stopwatch, rounds: int, weighed: Collection[str] = ()
) -> tuple[dict[str, float], dict[str, float]]:
    """Works in processes of their own, which hold what each needs and imports; they take turns.

    Returns:
        Seconds of each work's fastest call, and of those ``weighed`` the most bytes in use during a call,
        beyond what was in use before they were built.

    Raises:
        UserError: A process died.
    """
    context = multiprocessing.get_context("forkserver")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, context)) for name in builds}
        try:
            # They build at the same time, for nothing is timed yet.
            built = [
                pools[name].submit(_build, builds[name], watch, torch.get_num_threads()) for name in builds
            ]
            for one in built:
                one.result()

            def ask(name: str, what: str) -> float:
                return pools[name].submit(_ask, what).result()

            seconds = _take_turns({name: partial(ask, name, "seconds") for name in builds}, rounds)
            return seconds, {name: ask(name, "memory") for name in weighed}
        except BrokenProcessPool:
            raise UserError("a contestant died, most likely of memory; take smaller sizes") from None


_contestant: dict[str, Callable[[], float]] = {}
"""What may be asked of the work in this process."""


def _build(build: Build, watch: Stopwatch, threads: int) -> None:
    torch.set_num_threads(threads)
    memory = PeakMemory(watch.device)
    before = memory.now()
    work = build()
    _contestant["seconds"] = lambda: watch.seconds(work)
    _contestant["memory"] = lambda: memory.of(work) - before


def _ask(what: str) -> float:
    return _contestant[what]()


def alone(device: torch.device) -> Topology:
    """The topology of this process alone, whatever a launcher says; torch keeps its threads."""
    for key in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        os.environ.pop(key, None)
    threads = torch.get_num_threads()
    place = topology.join(1)
    torch.set_num_threads(threads)
    return replace(place, device=device)


@contextmanager
def passing_folder(parent: Path, needed: float = 0) -> Iterator[Path]:
    """A folder inside the user's ``--folder``, that goes away again.

    Raises:
        UserError: There is no such folder, or its disk has less than ``needed`` bytes.
    """
    if not parent.is_dir():
        raise UserError(f"--folder {parent} is no folder; make it first, on the disk to measure")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(f"--folder {parent} needs {needed / 1e9:.0f} GB free, has {free / 1e9:.0f}")
    with tempfile.TemporaryDirectory(dir=parent, prefix="benchmark-") as folder:
        yield Path(folder)
