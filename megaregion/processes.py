"""Work spread over processes; the results come in the order of the tasks."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megaregion.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


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


def _do(task: Any) -> Any:
    assert _work is not None  # the pool's initializer ran
    return _work(task)
