"""Time: of a call, of works that take turns, of works in processes of their own; and where it is taken."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

import torch

from benchmark.memory import PeakMemory
from megaregion.errors import UserError
from megaregion.parallel import topology
from megaregion.parallel.topology import Topology
from megaregion.planning.kernels import KernelCounter, Tally

T = TypeVar("T")
Work = Callable[[], object]
"""One step; it leaves everything as the next step wants it."""
Build = Callable[[], Work]
"""Makes the work; a function of a module, with its arguments, for a new process finds it by its name."""


class Race(NamedTuple):
    """What came of works that took turns."""

    figures: dict[str, float]
    """Seconds of each work's fastest call; as ``NAME: memory`` the bytes of those that were weighed."""
    failed: dict[str, str]
    """Why others have none."""


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on one device."""

    device: torch.device
    counts: ClassVar[bool] = False
    """Whether tensors are fake and nothing takes time."""
    processor: bool = False
    """Count the processors' time in this process and in those that it has ended, instead of the wall's: on a
    machine that others use at the same time, with one thread, it is what the wall clock would show if they
    did not."""
    patience: float = math.inf
    """Seconds after which a work that is not ready is named and left out of a race."""

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

    def race(self, builds: Mapping[str, Build], rounds: int, weighed: Collection[str] = ()) -> Race:
        """Let works that are built in processes of their own take turns; one that fails ends no other."""
        found = Race({}, {})
        running = {name: Contestant(build, self) for name, build in builds.items()}

        def ask(name: str, answer: Callable[[], float]) -> float:
            if name not in found.failed:
                try:
                    return answer()
                except UserError as error:
                    found.failed[name] = reason(error)
                    running[name].end()
            return math.inf

        try:
            # They build at the same time, for nothing is timed yet.
            for name, one in running.items():
                ask(name, one.answer)
            times = {name: partial(ask, name, partial(one.ask, "seconds")) for name, one in running.items()}
            found.figures.update(_take_turns(times, rounds))
            for name in weighed:
                found.figures[f"{name}: memory"] = ask(name, partial(running[name].ask, "memory"))
        finally:
            for one in running.values():
                one.end()
        return found

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


class Contestant:
    """A work in a process of its own, which holds what it needs and imports."""

    def __init__(self, build: Build, watch: Stopwatch) -> None:
        """Begin to build it; for that, and then for each answer, it has the watch's patience."""
        context = multiprocessing.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        arguments = theirs, build, watch, torch.get_num_threads()
        self._process, self._patience = context.Process(target=_contend, args=arguments), watch.patience
        self._ends = time.monotonic() + self._patience
        self._process.start()
        theirs.close()

    def ask(self, what: str) -> float:
        """Seconds of a call, or the most bytes in use during one, beyond what was before it was built."""
        self._ends = time.monotonic() + self._patience
        with suppress(OSError):  # Of one that is dead, which it then says.
            self._pipe.send(what)
        return self.answer()

    def answer(self) -> float:
        """Wait for what was asked, at first for its being built; raises UserError with why there is none."""
        left = None if math.isinf(self._ends) else max(0.0, self._ends - time.monotonic())
        if not self._pipe.poll(left):
            raise UserError("it was not ready in time; give more --seconds")
        try:
            found: float | str = self._pipe.recv()
        except (EOFError, OSError):
            raise UserError("it died, most likely of memory; take smaller sizes") from None
        if isinstance(found, str):
            raise UserError(found)
        return found

    def end(self) -> None:
        """Let it go, whatever it does."""
        self._process.kill()
        self._process.join()


def _contend(pipe: Connection, build: Build, watch: Stopwatch, threads: int) -> None:
    torch.set_num_threads(threads)
    memory = PeakMemory(watch.device)
    try:
        before = memory.now()
        work = build()
        if watch.device.type == "cuda":
            work()  # All compile at the same time.
        answers = {"seconds": lambda: watch.seconds(work), "memory": lambda: memory.of(work) - before}
        pipe.send(0.0)
        while True:
            pipe.send(answers[pipe.recv()]())
    except EOFError:
        pass  # Nobody asks any more.
    except Exception as error:
        pipe.send(reason(error))


def reason(error: Exception) -> str:
    """One line that says why there is no figure."""
    told = str(error).strip().splitlines()[:1]
    return ": ".join(([] if isinstance(error, UserError) else [type(error).__name__]) + told)


@dataclass(frozen=True)
class KernelWatch(Stopwatch):
    """Counts what calls ask of a GPU instead of taking their time, where tensors are fake."""

    counts: ClassVar[bool] = True
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By work."""
    mismatches: list[str] = field(default_factory=list)
    """Works that brought tensors of two devices together."""
    lacking: set[str] = field(default_factory=set)
    """Why works cannot run here that are not wrong by that."""

    def timed(self, work: Callable[[], T], name: str = "") -> tuple[T, float]:
        """What a call gives, and no number."""
        with KernelCounter(self.tallies.setdefault(name, Tally())):
            return work(), math.nan

    def fastest(self, works: Mapping[str, Work], rounds: int, left_out: int = 1) -> dict[str, float]:
        """Count each work's call, behind the first if that is left out: it makes what is made once."""
        for work in works.values() if left_out else ():
            work()
        for name, work in works.items():
            self.timed(work, name)
        return dict.fromkeys(works, math.nan)

    def race(self, builds: Mapping[str, Build], rounds: int, weighed: Collection[str] = ()) -> Race:
        """Count each work in this process, of its second call if there are any rounds."""
        found = Race({}, {})
        for name, build in builds.items():
            try:
                found.figures.update(self.fastest({name: build()}, rounds, min(1, rounds)))
            except Exception as error:
                found.failed[name] = self.failure(name, error)
        found.figures.update({f"{name}: memory": math.nan for name in weighed if name not in found.failed})
        return found

    def failure(self, name: str, error: Exception) -> str:
        """Note what ended a work; gives its reason."""
        told = reason(error)
        if isinstance(error, UserError):
            self.lacking.add(told)
        elif "device" in told.lower():
            self.mismatches.append(name)
            self.tallies.setdefault(name, Tally())
        return told


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
