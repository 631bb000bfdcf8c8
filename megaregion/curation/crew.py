"""The processes that do the pieces: started once for a run, each on one CPU core."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from megaregion.curation.stage import Job, Stage
from megaregion.curation.stages import make_stages
from megaregion.curation.store import Piece
from megaregion.errors import UserError

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Read by the numeric libraries when they are loaded."""


class Task(NamedTuple):
    """A piece to do, and the hash of what it will be made from."""

    piece: Piece
    key: str


class Message(NamedTuple):
    """What a worker reports: one more image, a finished piece, a user's mistake, or a fault of ours."""

    kind: str
    text: str = ""


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class Crew:
    """Does pieces in parallel.

    Args:
        job: The run.
        workers: Processes; 0 works in this one.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._count = job, workers
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task], tick: Callable[[], None]) -> None:
        """Do tasks, in any order.

        Args:
            tasks: What to do.
            tick: Called in this process for every image that is done.

        Raises:
            UserError: A mistake that a user can mend ended a piece, or a worker died.
        """
        if self._count == 0:
            stages = make_stages(self._job)
            for task in tasks:
                _do(task, self._job, stages, tick)
            return
        waiting, busy = list(reversed(tasks)), dict[Connection, Task]()
        while len(self._workers) < min(self._count, len(tasks)):
            self._workers.append(_start(self._job))
        for worker in self._workers:
            _hand_out(worker.pipe, waiting, busy)
        while busy:
            for pipe in _ready(busy):
                message = self._receive(pipe, busy[pipe])
                if message.kind == "image":
                    tick()
                elif message.kind == "mistake":
                    raise UserError(message.text)
                elif message.kind == "fault":
                    raise RuntimeError(f"a worker failed:\n{message.text}")
                else:
                    del busy[pipe]
                    _hand_out(pipe, waiting, busy)

    def close(self) -> None:
        """End the processes, also in the middle of a piece: it counts as not done."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _receive(self, pipe: Connection, task: Task) -> Message:
        worker = next(worker for worker in self._workers if worker.pipe is pipe)
        try:
            message: Message = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            raise UserError(
                f"the worker for piece {task.piece.number} of stage {task.piece.stage} died (exit code "
                f"{worker.process.exitcode}; -9 is often lack of memory); run again to continue, "
                "perhaps with fewer --workers"
            ) from None
        return message


def _ready(busy: dict[Connection, Task]) -> list[Connection]:
    """Workers that have something to say, or died."""
    return [pipe for pipe in wait(list(busy)) if isinstance(pipe, Connection)]


def _start(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with _environment(ONE_THREAD):
        process = context.Process(target=_serve, args=(theirs, job, os.getpid()), daemon=True)
        process.start()
    # Only the worker may hold its end, or its death would not be seen here.
    theirs.close()
    return _Worker(process, ours)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _hand_out(pipe: Connection, waiting: list[Task], busy: dict[Connection, Task]) -> None:
    if waiting and pipe not in busy:
        busy[pipe] = waiting.pop()
        pipe.send(busy[pipe])


def _serve(pipe: Connection, job: Job, parent: int) -> None:
    """A worker's life: tasks until the other end closes."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stages = make_stages(job)

    def tick() -> None:
        # A worker that outlives its run could write into the folder of the next one.
        if os.getppid() != parent:
            os._exit(1)
        pipe.send(Message("image"))

    while True:
        try:
            task: Task = pipe.recv()
        except EOFError:
            return
        try:
            _do(task, job, stages, tick)
            answer = Message("done")
        except UserError as error:
            answer = Message("mistake", str(error))
        except Exception:
            answer = Message("fault", traceback.format_exc())
        pipe.send(answer)


def _do(task: Task, job: Job, stages: dict[str, Stage], tick: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        output = job.store.begin(task.piece, tick)
        stages[task.piece.stage].work(task.piece.number, output)
        job.store.finish(task.piece, task.key, output, began)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left in {job.store.root}; free some and run again, what is done is kept"
        ) from None
