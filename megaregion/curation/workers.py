"""The processes that do the pieces, each on one CPU core or one GPU, and what they hold.

A stage whose network runs on a GPU gets one process a GPU, and its share of the others to decode for it.

concurrent.futures would not do: there a process that dies takes the pool with it, and nobody knows which
piece it was at. Here it is replaced, and its piece done again. Locks end with their process:

    OUT/.lock                        held by a run alone, or by shares of one together; names it
    OUT/stages/STAGE/.locks          byte i is locked while piece i is worked on
    OUT/stages/STAGE/.notes/00003    who works on it and how far, rewritten every few seconds; why it failed

None of these files is part of the outcome.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megaregion.curation.stages import make_stages
from megaregion.curation.stages.stage import Job, Output, Piece, Stage, writable
from megaregion.errors import UserError
from megaregion.files import locked, new_file, read_json

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Read by the numeric libraries when they are loaded."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable that names the GPUs of a process."""
LOG = logging.getLogger("megaregion.curation")

MAX_DEATHS = 3
"""Workers that one piece may cost before the run ends."""
BEAT = 5.0
"""Seconds between signs of life."""
PATIENCE = 120.0
"""Seconds that a piece in use is waited for: a network file system holds a dead node's locks for a while."""
SILENCE = 60.0
"""Seconds without one after which a piece's worker counts as dead."""
IMAGE, DONE = "image", "done"
"""What a worker says after an image and after a piece; after a failure it sends the exception."""


class Task(NamedTuple):
    """A piece to do, and what its manifest will say of its origin."""

    piece: Piece
    key: str
    """Hash of what it will be made from."""
    recipes: dict[str, str]
    """Hash of the settings of its stage and of those before it."""
    again: bool = False
    """Whether a task on the same images follows, for which decoded pictures are kept."""


class Workers:
    """Does pieces in parallel, in so many processes; with 0 of them in this one.

    They stay from stage to stage, until a stage needs a GPU, or needs none any more.
    """

    def __init__(self, job: Job, count: int) -> None:
        self._job, self._count = job, count
        self._processes: dict[Connection, tuple[BaseProcess, str]] = {}
        """Each with the name of its GPU, empty for none."""

    def run(self, chains: Sequence[Iterator[Task]], ticks: Mapping[str, Callable[[], None]]) -> int:
        """Do chains of tasks, in any order; of one, a process does each when those before it are done.

        ``ticks``, by stage, are called in this process for every image that is done. Gives the tasks done.
        Raises UserError where a mistake that a user can mend, or the death of several workers, ended a piece.
        """
        stages, done = make_stages(self._job), 0
        together = any(stages[name].together for name in ticks)
        if self._count == 0 or together:
            with _threads(self._count) if together else nullcontext():
                for task in chain.from_iterable(chains):
                    _do(task, self._job, stages, ticks[task.piece.stage])
                    done += 1
            return done
        on_gpu = any(stages[name].on_gpu() for name in ticks)
        crew, deaths = self._crew(gpus() if on_gpu else [], len(chains)), Counter[Piece]()
        ends = [len(chains) * number // len(crew) for number in range(len(crew) + 1)]
        shares = {pipe: deque(chains[ends[n] : ends[n + 1]]) for n, pipe in enumerate(crew)}
        busy: dict[Connection, tuple[Task, Iterator[Task]]] = {}

        def proceed(pipe: Connection, own: Iterator[Task]) -> None:
            task, share = next(own, None), shares[pipe]
            while task is None and any(shares.values()):
                # Neighbours stay together, for whoever reads a tar reads all of its headers first.
                if not share:
                    most = max(shares.values(), key=len)
                    share.extendleft([most.pop() for _ in range((len(most) + 1) // 2)])
                own = share.popleft()
                task = next(own, None)
            if task is not None:
                busy[pipe] = task, own
                # A worker that is dead already will be seen to be when it is listened to.
                with suppress(OSError):
                    pipe.send(task)

        for pipe in crew:
            proceed(pipe, iter(()))
        while busy:
            ready = wait(list(busy))
            for pipe in [each for each in busy if each in ready]:
                task, own = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    del busy[pipe]
                    deaths[task.piece] += 1
                    gpu = self._bury(pipe, task.piece, deaths[task.piece])
                    fresh = self._start(gpu)
                    shares[fresh] = shares.pop(pipe)
                    proceed(fresh, chain([task], own))
                    continue
                if isinstance(message, Exception):
                    raise message
                if message == IMAGE:
                    ticks[task.piece.stage]()
                else:
                    done += 1
                    del busy[pipe]
                    proceed(pipe, own)
        return done

    def close(self) -> None:
        """End the processes, also in the middle of a piece: it counts as not done."""
        for process, _ in self._processes.values():
            process.terminate()
        for pipe, (process, _) in self._processes.items():
            process.join()
            pipe.close()
        self._processes.clear()

    def _crew(self, names: Sequence[str], chains: int) -> list[Connection]:
        """Workers for so many chains, one for each GPU of these names, or as many as there may be."""
        if any(bool(gpu) != bool(names) for _, gpu in self._processes.values()):
            self.close()
        held = [gpu for _, gpu in self._processes.values()]
        missing = [name for name in names if name not in held] if names else [""] * (self._count - len(held))
        for gpu in missing[: max(0, chains - len(held))]:
            self._start(gpu)
        return list(self._processes)

    def _start(self, gpu: str = "") -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        job, seen = self._job, {}
        if gpu:
            # All libraries find their GPU as the first one.
            job, seen = replace(job, decoders=max(1, self._count // len(gpus()))), {VISIBLE: gpu}
        # A process with decoders of its own must not be a daemon.
        process = context.Process(target=_serve, args=(theirs, job, os.getpid()), daemon=not gpu)
        with _environment({**ONE_THREAD, **seen}):
            process.start()
        # Only the worker may hold its end, or its death would not be seen here.
        theirs.close()
        self._processes[ours] = process, gpu
        return ours

    def _bury(self, pipe: Connection, piece: Piece, deaths: int) -> str:
        """Gives the GPU of a dead worker; raises UserError where its piece has killed too many."""
        process, gpu = self._processes.pop(pipe)
        process.join()
        pipe.close()
        died = (
            f"the worker for piece {piece.number} of stage {piece.stage} died (exit code "
            f"{process.exitcode}; -9 is often lack of memory)"
        )
        if deaths >= MAX_DEATHS:
            raise UserError(f"{died} {deaths} times; run again to continue, perhaps with fewer --workers")
        LOG.warning("%s; the piece is done again", died)
        return gpu


def gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use as many threads here as there would be workers; ranks have theirs already."""
    import torch
    import torch.distributed as dist

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
        except Exception as error:
            if "DataLoader worker" in str(error):
                # A decoder that died takes its worker along: it will be replaced, and the piece done again.
                os._exit(1)
            answer = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
        pipe.send(answer)


def _do(task: Task, job: Job, stages: dict[str, Stage], tick: Callable[[], None]) -> None:
    began = time.monotonic()
    piece = task.piece
    job.kept.turn_to(piece.number, task.again)
    # Ranks have imported torch to meet; one process alone may do without it.
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized() and dist.get_rank():
        # The first rank holds the piece, and writes it.
        stages[piece.stage].work(piece.number, Output(job.store.folder(piece), tick, task.key))
        return
    with writable(job.store.root), held(job.store.folder(piece).parent, piece.number, tick) as count:
        output = job.store.begin(piece, count, task.key)
        stages[piece.stage].work(piece.number, output)
        job.store.finish(piece, output, began, task.recipes)


# What they hold


@dataclass
class Note:
    """What a process says of a piece: that it works on it, or how its last try ended without an outcome."""

    host: str
    process: int
    began: float
    """Seconds since 1970."""
    images: int = 0
    """Images that are done."""
    failure: str = ""

    @property
    def name(self) -> str:
        """The process, for messages."""
        return f"process {self.process} on {self.host}"


@contextmanager
def folder_held(out: Path, shared: bool = False) -> Iterator[None]:
    """Hold a run's folder, made if missing, for this process; shares of a run may hold it together.

    Raises UserError where another run holds it, or it cannot be written.
    """
    path = out / ".lock"
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(locked(path, wait=False, shared=shared))
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be written ({error.strerror}); choose another folder"
            ) from None
        if not free:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise UserError(
                f"--out {out} is in use by {holder}; wait until it has ended or choose another folder"
            )
        path.write_text("a share of a run, " * shared + _this_process().name)
        yield


@contextmanager
def held(folder: Path, number: int, tick: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold a piece of a stage's folder for this process, and leave a note if its work fails.

    Yields what must be called for every image, which calls ``tick``. Raises UserError where another process
    works on the piece.
    """
    note, path = _this_process(), _path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (folder / ".locks").open("ab") as locks:
        _lock(locks, folder, number)

        def count() -> None:
            note.images += 1
            tick()

        with _beating(path, note):
            try:
                yield count
            except BaseException as error:
                note.failure = f"{error.__class__.__name__}: {error} ({note.name})"
                raise


def read_note(folder: Path, number: int) -> Note | None:
    """What is said of a piece of a stage, None if nothing; that its worker was killed is a failure."""
    path = _path(folder, number)
    try:
        note = Note(**read_json(path))
        silence = time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    here = note.host == socket.gethostname()
    if not note.failure and (silence > SILENCE or (here and not Path(f"/proc/{note.process}").exists())):
        note.failure = f"{note.name} was killed after {note.images} images"
    return note


def _path(folder: Path, number: int) -> Path:
    return folder / ".notes" / f"{number:05d}"


def _this_process() -> Note:
    return Note(socket.gethostname(), os.getpid(), time.time())


def _lock(locks: BinaryIO, folder: Path, number: int) -> None:
    """Lock a piece; the worker of a run that was killed lets go of it within an image."""
    began = time.monotonic()
    told = False
    while True:
        try:
            return fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            waited = time.monotonic() - began
        note = read_note(folder, number)
        name = note.name if note and not note.failure else "another process"
        state = f"piece {number} of stage {folder.name} is in use by {name}"
        if waited > PATIENCE:
            raise UserError(f"{state}; wait until it has ended")
        if waited > 2 and not told:
            LOG.warning("%s; waiting for it", state)
            told = True
        time.sleep(0.1)


@contextmanager
def _beating(path: Path, note: Note) -> Iterator[None]:
    """Write the note every few seconds, and at the end where there is a failure to tell."""
    ended = threading.Event()

    def write() -> None:
        # A full disk must not end the work for a note.
        with suppress(OSError), new_file(path, shared=True, durable=False) as file:
            file.write(json.dumps(asdict(note)).encode())

    def beat() -> None:
        while not ended.wait(BEAT):
            write()

    write()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if note.failure:
            write()
        else:
            path.unlink(missing_ok=True)
