"""Processes: how one ends (exit codes, mistakes, the line that says why, signals), and work for many."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

EARLY_EXIT = 1
"""Exit code of a rank that left before the first step. srun tells the highest code of all ranks, and when one
fails it asks the others to stop: theirs must not hide its own."""
USER_ERROR_EXIT = 2
"""Exit code of a command that ended because of a :class:`UserError`."""
REQUEUE_EXIT = 85
"""Exit code of a run that saved on a signal and wants to be started again."""
FENCED_EXIT = 86
"""Exit code of a run that found a newer start of itself and ended; it must not be started again."""
WATCHDOG_EXIT = 87
"""Exit code of a run that stood still and was ended by its watchdog."""
UNFIT_EXIT = 88
"""Exit code of a start that found a host sick, slow or different; another allocation may do without it."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EARLY = "asked to stop before the first step; there is nothing to save"


class UserError(Exception):
    """Bad input from outside (a setting, a file, a folder); its text is all that the user sees."""


class Fenced(Exception):
    """A newer start of the same run owns its folder; its text is one line, and this process must end."""


def is_said(line: str) -> bool:
    """Whether another rank has said a line on the terminal that it shares with this one; else this one must.

    torchrun gives the ranks of a host one folder, for as long as they run.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return False
    try:
        (Path(own).parents[1] / f"said-{hashlib.sha256(line.encode()).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except (OSError, IndexError):
        pass
    return False


def say(line: object) -> None:
    """Tell the user why this command ends, on stderr."""
    if not is_said(str(line)):
        print(f"megaregion: {line}", file=sys.stderr, flush=True)


class StopRequest:
    """Remembers that somebody asked this process to stop.

    Until the first step there is nothing to save: a rank that is asked to stop while it starts leaves at
    once, also where it waits for ranks that will never come.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._starting = False

    def install(self) -> StopRequest:
        """Start to listen, before torch is imported: a signal that arrives earlier would kill the rank."""
        self._starting = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler between two instructions, which a wait inside a library may never reach; the
        # number that the system's own handler writes here wakes a thread.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._leave_early, args=(reader,), name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def begin(self) -> None:
        """Steps begin: from now on a request is remembered, and the run saves before it leaves."""
        self._starting = False

    def leave(self) -> None:
        """Ignore stop requests from now on; call it before the last barrier of all ranks.

        The first rank to exit with 85 makes srun terminate the others, which may still be tidying up: without
        this their exit code would tell of a signal instead of a saved run.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _leave_early(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            if self._starting and any(number in STOP_SIGNALS for number in numbers):
                if not is_said(EARLY):
                    os.write(2, f"megaregion: {EARLY}\n".encode())
                os._exit(EARLY_EXIT)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


# ---- work spread over processes --------------------------------------------------------------------


def spread(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Do tasks in worker processes, of which 0 and 1 are this one; their number changes no result.

    Each gets a copy of ``work`` once. Tasks are read a few ahead of the results that are taken, or all
    results could pile up.

    Raises:
        UserError: A worker died.
    """
    if workers <= 1:
        yield from map(work, tasks)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Not forked: a parent that holds threads (torch, BLAS) would hand its locks to the child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (work,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_do, task))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker died, most likely of memory; try again with --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _start(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed says no goodbye, and its workers would do what is left beside its next start.
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _do(task: Any) -> Any:
    assert _work is not None  # the pool's initializer ran
    return _work(task)
