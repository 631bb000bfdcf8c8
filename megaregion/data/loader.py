"""Batches for a list of positions, prepared by worker processes.

Each worker turns whole batches of positions into tensors; since every sample is a function of its
position, batches come out the same for any number of workers, none included. A sample that cannot be
used is replaced, counted and named in its batch; too many stop the run.

Workers ignore the signals that ask a run to save and stop: whoever signals a job reaches all of its
processes, and a loader that dies first would cost the run its last checkpoint.
"""

from __future__ import annotations

import atexit
import gc
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from megaregion.config import DataConfig
from megaregion.data.batch import Batch
from megaregion.data.batcher import Batcher, Failure
from megaregion.data.image import stay_on_one_core
from megaregion.data.order import SampleOrder
from megaregion.data.pool import Pool
from megaregion.data.shards import ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.errors import UserError
from megaregion.heap import keep_freed_memory

JUDGED_SAMPLES = 1_000
"""The share of bad samples is judged over at least so many, lest one early find stop a run."""
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the run's main process answers for its workers."""


class RegionLoader:
    """Prepares batches ahead of the training loop.

    Args:
        dataset: Where samples are read.
        order: Which sample stands at which position.
        transform: What is made of a sample.
        config: Workers, prefetching and the bearable share of bad samples.
        skips_lost: Whether samples of a shard that cannot be read are replaced; False ends the run, where
            several ranks read the same samples and must agree on them.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        order: SampleOrder,
        transform: Transform,
        config: DataConfig,
        skips_lost: bool = True,
    ) -> None:
        self._batcher = Batcher(dataset, order, transform, config, skips_lost)
        self._config = config
        self._seen = self._bad = 0
        self._streams: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()
        # Before any worker is forked, which would inherit a pool without its threads.
        stay_on_one_core()
        # Must run before multiprocessing's own exit hook, which waits for workers that nobody told to stop.
        atexit.register(_close, weakref.ref(self))

    def batches(self, positions: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """Prepare exactly these batches, in this order.

        Args:
            positions: Positions of each batch; read only as far ahead as workers prefetch, so it may
                be endless.

        Raises:
            UserError: A label lies outside its label space, too many samples are bad, or a worker died.
            LostShard: Too much of the storage fails, or any of it where nothing may be skipped.
        """
        stream = self._stream(positions)
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Stop all workers; a batch that was not taken is lost."""
        for stream in list(self._streams):
            stream.close()

    def _stream(self, positions: Iterable[Sequence[int]]) -> Generator[Batch]:
        workers = self._config.workers
        # Beside what is prepared ahead, the batch in use and the one that is about to take its place.
        pool = Pool(workers, self._config.prefetch + 2) if workers else None
        loader = DataLoader(
            replace(self._batcher, pool=pool),
            batch_sampler=cast(Any, positions),  # its type says list; any sequence passes through
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=self._config.prefetch if workers else None,
            # The pool's memory is inherited.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_start_worker,
            # A thread copies each batch to page-locked memory; the copy to the GPU then runs beside the step.
            pin_memory=torch.cuda.is_available(),
            # Without its own generator the loader would draw from torch's global one.
            generator=torch.Generator(),
        )
        child_handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        # torch reports a dead worker from a signal handler, anywhere in the program, even in the middle
        # of a save. Without it the report comes from next() below, a few seconds later.
        if workers and signal.getsignal(signal.SIGCHLD) is not child_handler:
            signal.signal(signal.SIGCHLD, child_handler)
        try:
            while (batch := self._next(iterator)) is not None:
                yield batch
        finally:
            if workers:
                _stop_workers(iterator)
            if pool is not None:
                pool.close()

    def _next(self, iterator: Iterator[Batch | Failure]) -> Batch | None:
        try:
            batch = next(iterator, None)
        except (RuntimeError, OSError, EOFError) as error:
            dead = _dead_workers(iterator)
            if not dead:
                raise
            raise UserError(
                f"a data worker died: {', '.join(dead)}; it was ended from outside, most often for lack of "
                f"memory: lower data.workers ({self._config.workers}) or data.prefetch "
                f"({self._config.prefetch})"
            ) from error
        if isinstance(batch, Failure):
            raise batch.to_error()
        if batch is not None:
            self._judge(batch)
        return batch

    def _judge(self, batch: Batch) -> None:
        self._seen += len(batch.keys)
        self._bad += batch.bad
        if self._bad > self._config.max_bad_share * max(self._seen, JUDGED_SAMPLES):
            named = "; ".join(
                f"{key}: {why}" for key, why in zip(batch.bad_keys, batch.bad_reasons, strict=True)
            )
            text = (
                f"{self._bad} of {self._seen} samples of {self._batcher.dataset.folder} could not be used, "
                f"more than data.max_bad_share {self._config.max_bad_share} allows; the last ones: {named}"
            )
            raise Failure(text, storage=batch.lost > 0).to_error()


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    stay_on_one_core()
    keep_freed_memory()
    # What was imported stays: the collector would look through all of it again and again, and copy its pages.
    gc.freeze()
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _dead_workers(iterator: Iterator[Any]) -> list[str]:
    """Say which worker processes have ended, and how."""
    dead = []
    for number, process in enumerate(getattr(iterator, "_workers", ())):
        # A worker's sockets close a moment before the process is seen to have ended.
        process.join(timeout=0.5)
        if (code := process.exitcode) is not None:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            dead.append(f"worker {number} (pid {process.pid}, {how})")
    return dead


def _stop_workers(iterator: Any) -> None:
    # torch has no public way to stop workers, and its finaliser waits for the garbage collector, which a
    # traceback can put off until after the exit hooks.
    iterator._shutdown_workers()
    for process in iterator._workers:
        # Given 5 seconds, it is stuck (a file system that does not answer), and exit hooks would wait for it.
        if process.is_alive():
            process.kill()
            process.join()


def _close(reference: weakref.ref[RegionLoader]) -> None:
    if (loader := reference()) is not None:
        loader.close()
