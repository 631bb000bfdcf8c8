"""One way to do a piece of work, alive in a process of its own.

Each contestant's memory is its own, what it imports included, and contestants take turns: a machine that
slows down in the middle of a benchmark slows all of them.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmark.measure import Stopwatch
from benchmark.memory import PeakMemory

Work = Callable[[], object]
"""One step; it leaves everything as the next step wants it."""
Build = tuple[Callable[..., Work], tuple[Any, ...]]
"""What makes the work, a function of a module, for it is found by its name in the new process; and its
arguments."""


class Contestant:
    """A process that builds its work, and does it when it is told to.

    Args:
        build: Makes the work.
        watch: The clock, on the device where the work runs.
    """

    def __init__(self, build: Build, watch: Stopwatch) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, build, watch, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        other.close()

    def wait(self) -> None:
        """Wait until the work is built, before anything else is asked."""
        self._answer()

    def seconds(self) -> float:
        """Seconds of one more step."""
        return self._ask("step")

    def memory(self) -> int:
        """Greatest memory while it takes a step, in bytes, beyond what was in use before it was built."""
        return int(self._ask("memory"))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(30)
        self._process.kill()

    def _ask(self, what: str) -> float:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> float:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"a contestant died with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)


@contextmanager
def contestants(builds: Mapping[str, Build], watch: Stopwatch) -> Iterator[dict[str, Contestant]]:
    """Start a process for each, and end all of them."""
    started: dict[str, Contestant] = {}
    try:
        for name, build in builds.items():
            started[name] = Contestant(build, watch)
        # They build at the same time, for nothing is timed yet.
        for contestant in started.values():
            contestant.wait()
        yield started
    finally:
        for contestant in started.values():
            contestant.close()


def take_turns(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    """Seconds of each contestant's fastest step; they take turns, and the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 + rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant.seconds())
    return {name: min(each[1:]) for name, each in times.items()}


def _serve(pipe: Connection, build: Build, watch: Stopwatch, threads: int) -> None:
    torch.set_num_threads(threads)
    memory = PeakMemory(watch.device)
    try:
        before = memory.now()
        make, arguments = build
        work = make(*arguments)
        pipe.send(0.0)
        while True:
            if pipe.recv() == "step":
                pipe.send(watch.seconds(work))
            else:
                memory.reset()
                work()
                pipe.send(float(memory.peak() - before))
    except EOFError:
        return
    except BaseException:
        pipe.send(traceback.format_exc())
