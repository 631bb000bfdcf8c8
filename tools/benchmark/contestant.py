"""One way to do a piece of work, alive in a process of its own.

Each contestant's memory is its own, what it imports included, and contestants take turns: a machine that
slows down in the middle of a benchmark slows all of them.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmark.measure import PeakMemory, Stopwatch

Work = Callable[[], object]
"""One step; it leaves everything as the next step wants it."""


class Contestant:
    """A process that does its work when it is told to.

    Args:
        build: Makes the work; a function of a module, for it is found by its name in the new process.
        arguments: What build takes.
        device: Where the work runs.
        threads: Threads of the processor; 0 leaves torch's choice.
        processor: Count the process's processor time; see Stopwatch.
    """

    def __init__(
        self,
        build: Callable[..., Work],
        arguments: tuple[Any, ...],
        device: torch.device,
        threads: int = 0,
        processor: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        threads = threads or torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(other, build, arguments, str(device), threads, processor), daemon=True
        )
        self._process.start()
        other.close()
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


def take_turns(contestants: Mapping[str, Contestant], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Seconds of each contestant's fastest step, one after the other in each round.

    Args:
        contestants: By name.
        rounds: Timed steps of each.
        warm_up: Steps of each before that do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warm_up + rounds):
        for name, contestant in contestants.items():
            seconds = contestant.seconds()
            if number >= warm_up:
                times[name].append(seconds)
    return {name: min(of) for name, of in times.items()}


def _serve(
    pipe: Connection,
    build: Callable[..., Work],
    arguments: tuple[Any, ...],
    device: str,
    threads: int,
    processor: bool,
) -> None:
    torch.set_num_threads(threads)
    watch, memory = Stopwatch(torch.device(device), processor), PeakMemory(torch.device(device))
    try:
        before = memory.now()
        work = build(*arguments)
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
