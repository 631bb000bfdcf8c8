"""The processes that do the pieces: started once for a run, each on one CPU core.

concurrent.futures would not do: there a process that dies takes the pool with it, and nobody knows which
piece it was at. Here it is replaced, and its piece done again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
import torch.distributed as dist

from megaregion.curation.runner.holder import held
from megaregion.curation.stages import make_stages
from megaregion.curation.stages.stage import Job, Stage
from megaregion.curation.stages.store import Output, Piece, writable
from megaregion.errors import UserError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Read by the numeric libraries when they are loaded."""
LOG = logging.getLogger("megaregion.curation")

MAX_DEATHS = 3
"""Workers that one piece may cost before the run ends."""
IMAGE, DONE = "image", "done"
"""What a worker says after an image and after a piece; after a failure it sends the exception."""


class Task(NamedTuple):
    """A piece to do, and what its manifest will say of its origin."""

    piece: Piece
    key: str
    """Hash of what it will be made from."""
    recipes: dict[str, str]
    """Hash of the settings of its stage and of those before it."""


class Workers:
    """Does pieces in parallel, in so many processes; with 0 of them in this one."""

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count = job, count
        self._processes: dict[Connection, BaseProcess] = {}

    def run(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        """Do tasks, in any order; ``tick`` is called in this process for every image that is done.

        Raises:
            UserError: A mistake that a user can mend ended a piece, or a piece killed several workers.
        """
        stages = make_stages(self._job)
        together = any(stages[task.piece.stage].together for task in tasks)
        if self._count == 0 or together:
            with _threads(self._count) if together else nullcontext():
                for task in tasks:
                    _do(task, self._job, stages, tick)
            return
        waiting, deaths = list(reversed(tasks)), Counter[Piece]()
        busy: dict[Connection, Task] = {}
        while len(self._processes) < min(self._count, len(tasks)):
            self._start()
        idle = list(self._processes)
        while waiting or busy:
            while waiting and idle:
                pipe = idle.pop()
                busy[pipe] = waiting.pop()
                # A worker that is dead already will be seen to be when it is listened to.
                with suppress(OSError):
                    pipe.send(busy[pipe])
            ready = wait(list(busy))
            for pipe in [each for each in busy if each in ready]:
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    task = busy.pop(pipe)
                    deaths[task.piece] += 1
                    self._bury(pipe, task.piece, deaths[task.piece])
                    waiting.append(task)
                    idle.append(self._start())
                    continue
                if isinstance(message, Exception):
                    raise message
                if message == IMAGE:
                    tick()
                else:
                    del busy[pipe]
                    idle.append(pipe)

    def close(self) -> None:
        """End the processes, also in the middle of a piece: it counts as not done."""
        for process in self._processes.values():
            process.terminate()
        for pipe, process in self._processes.items():
            process.join()
            pipe.close()
        self._processes.clear()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._job, os.getpid()), daemon=True)
        with _environment(ONE_THREAD):
            process.start()
        # Only the worker may hold its end, or its death would not be seen here.
        theirs.close()
        self._processes[ours] = process
        return ours

    def _bury(self, pipe: Connection, piece: Piece, deaths: int) -> None:
        """Raises UserError where the dead worker's piece has killed too many."""
        process = self._processes.pop(pipe)
        process.join()
        pipe.close()
        died = (
            f"the worker for piece {piece.number} of stage {piece.stage} died (exit code "
            f"{process.exitcode}; -9 is often lack of memory)"
        )
        if deaths >= MAX_DEATHS:
            raise UserError(f"{died} {deaths} times; run again to continue, perhaps with fewer --workers")
        LOG.warning("%s; the piece is done again", died)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use as many threads here as there would be workers; ranks have theirs already."""
    before = torch.get_num_threads()
    if not dist.is_initialized() or dist.get_world_size() == 1:
        torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _serve(pipe: Connection, job: Job, parent: int) -> None:
    """A worker's life: tasks until the other end closes."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stages = make_stages(job)

    def tick() -> None:
        # A worker that outlives its run could write into the folder of the next one.
        if os.getppid() != parent:
            os._exit(1)
        pipe.send(IMAGE)

    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        try:
            _do(task, job, stages, tick)
            answer: str | Exception = DONE
        except (UserError, OSError, MemoryError) as error:
            # A line says enough of them.
            answer = error
        except Exception:
            answer = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
        pipe.send(answer)


def _do(task: Task, job: Job, stages: dict[str, Stage], tick: Callable[[], None]) -> None:
    began = time.monotonic()
    piece = task.piece
    if dist.is_initialized() and dist.get_rank():
        # The first rank holds the piece, and writes it.
        stages[piece.stage].work(piece.number, Output(job.store.folder(piece), tick, task.key))
        return
    with writable(job.store.root), held(job.store.folder(piece).parent, piece.number, tick) as count:
        output = job.store.begin(piece, count, task.key)
        stages[piece.stage].work(piece.number, output)
        job.store.finish(piece, output, began, task.recipes)
