"""Batches for a list of positions, prepared by worker processes.

Each worker turns whole batches of positions into tensors; since every sample is a function of its
position, batches come out the same for any number of workers, none included.

A sample that cannot be used is replaced by the order's rule, counted and named in its batch; too many stop
the run. Storage that fails is read again after a pause, then without the shard that stays away: a file server
that restarts is back within a minute; a shard on a broken disk is not, and a run of weeks must not end over
it. What is skipped is no longer a function of (seed, position), so it is always told.

Workers ignore the signals that ask a run to save and stop: whoever signals a job reaches all of its
processes, and a loader that dies first would cost the run its last checkpoint.
"""

from __future__ import annotations

import atexit
import gc
import signal
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from megaregion.config import DataConfig
from megaregion.data.batch import Batch, Findings, Pool, Sample, collate
from megaregion.data.image import Jpeg, open_image, stay_on_one_core
from megaregion.data.order import MixedOrder, Orders
from megaregion.data.remote import Prefetcher
from megaregion.data.sample import BadSample, clip_regions, parse_sample
from megaregion.data.shards import Datasets, RawSample
from megaregion.data.transforms import Transform, check_size
from megaregion.errors import UserError
from megaregion.processor import keep_freed_memory

JUDGED_SAMPLES = 1_000
"""The share of bad samples is judged over at least so many, lest one early find stop a run."""
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the run's main process answers for its workers."""
MAX_TRIES = 100
"""Samples tried for one position, the first included."""
GROUP_BYTES = 16 << 20
"""Encoded images that are held at a time; a batch of 180 photos of 90 KB."""
RETRY_LOST_AFTER = 600.0
"""Seconds after which a lost shard is tried once more."""


class LostShard(OSError):
    """A shard that cannot be read; a later start may find the storage mended. Its text is one line."""


class RegionLoader:
    """Prepares batches ahead of the training loop.

    With `skips_lost`, samples of a shard that cannot be read are replaced. Without, they end the run: several
    ranks that read the same samples must agree on them.
    """

    def __init__(
        self,
        dataset: Datasets,
        order: Orders,
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
        """Prepare exactly these batches, in this order; positions are read only as far as workers prefetch.

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

    def _next(self, iterator: Iterator[Batch | UserError | LostShard]) -> Batch | None:
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
        if isinstance(batch, Exception):
            raise batch
        if batch is not None:
            self._judge(batch)
        return batch

    def _judge(self, batch: Batch) -> None:
        self._seen += len(batch.keys)
        self._bad += batch.found.bad
        if self._bad > self._config.max_bad_share * max(self._seen, JUDGED_SAMPLES):
            named = "; ".join(
                f"{key}: {why}"
                for key, why in zip(batch.found.bad_keys, batch.found.bad_reasons, strict=True)
            )
            raise (LostShard if batch.found.lost else UserError)(
                f"{self._bad} of {self._seen} samples of {self._batcher.dataset.folder} could not be used, "
                f"more than data.max_bad_share {self._config.max_bad_share} allows; the last ones: {named}"
            )


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


class _Undecoded(NamedTuple):
    """A sample whose pixels are still to be decoded."""

    sample: Sample
    image: Image.Image | Jpeg
    size: int
    """Bytes of the encoded image."""
    dropped: int
    """Regions without area inside the image."""
    tried: int
    """Samples tried for the position, this one included."""


@dataclass(frozen=True, eq=False)
class Batcher(Dataset[Batch | UserError | LostShard]):
    """Makes a batch of the samples at some positions, in a worker process.

    Records are read for a group of samples before the pictures of the group are decoded: a decoder's tables
    and pixels push everything else out of the processor's caches, and short work that finds its code there
    again takes half the time.
    """

    dataset: Datasets
    order: Orders
    transform: Transform
    config: DataConfig
    skips_lost: bool
    """Whether samples of a shard that cannot be read are replaced."""
    pool: Pool | None = None
    """Memory for the batches that worker processes send."""

    @cached_property
    def _reader(self) -> RetryingReader:
        return RetryingReader(self.dataset, self.config.read_retries, self.config.read_pause)

    @cached_property
    def _prefetchers(self) -> list[Prefetcher | None]:
        """One for each remote dataset."""
        orders = self.order.orders if isinstance(self.order, MixedOrder) else (self.order,)
        return [
            None if part.mirror is None else Prefetcher(part.mirror, order)
            for part, order in zip(self.dataset.parts, orders, strict=True)
        ]

    def __getitems__(self, positions: Sequence[int]) -> Batch | UserError | LostShard:
        """The batch of some positions, or why the run has to end: raised here, it would bring a traceback."""
        found = Findings()
        first = positions[0]
        places = self.order.reached(first) if isinstance(self.order, MixedOrder) else [first]
        for prefetcher, place in zip(self._prefetchers, places, strict=True):
            if prefetcher is not None:
                prefetcher.reached(place)
        self.dataset.read_ahead([self.order.sample(position) for position in positions])
        try:
            return collate(self._samples(positions, found), len(positions), self.config, found, self.pool)
        except (UserError, LostShard) as error:
            return error

    def _samples(self, positions: Sequence[int], found: Findings) -> Iterator[Sample]:
        group: deque[_Undecoded] = deque()
        size = 0
        for position in positions:
            group.append(self._undecoded(position, 0, found))
            size += group[-1].size
            if size >= GROUP_BYTES:
                yield from self._decoded(group, found)
                size = 0
        yield from self._decoded(group, found)

    def _decoded(self, group: deque[_Undecoded], found: Findings) -> Iterator[Sample]:
        """Empty the group, so that no picture is held longer than it is needed."""
        while group:
            sample, image, _, dropped, tried = group.popleft()
            try:
                sample = self.transform.decode(image, sample)
            except BadSample as reason:
                found.add_bad(sample.key, reason)
                group.appendleft(self._undecoded(sample.position, tried, found))
            else:
                found.dropped_regions += dropped
                yield sample

    def _undecoded(self, position: int, tried: int, found: Findings) -> _Undecoded:
        """The next usable sample for a position, as far as its record and its image's header tell."""
        for attempt in range(tried, MAX_TRIES):
            index = self.order.replacement(position, attempt) if attempt else self.order.sample(position)
            try:
                raw = self._reader.read(index)
            except LostShard as reason:
                if not self.skips_lost or attempt == MAX_TRIES - 1:
                    raise
                found.lost += 1
                found.add_bad(f"sample {index}", reason)
                continue
            try:
                record, dropped = clip_regions(parse_sample(raw.record))
                record = self.dataset.labelled(index, raw.key, record)
                image = open_image(raw.image)
                check_size(image, record)
            except BadSample as reason:
                found.add_bad(raw.key, reason)
                continue
            sample = self.transform.frame(record, position, raw.key)
            if sample is not None:
                return _Undecoded(sample, image, len(raw.image), dropped, attempt + 1)
            found.empty += 1
        raise UserError(
            f"{self.dataset.folder} gave no usable sample in {MAX_TRIES} tries for position {position}; "
            f"bad samples: {', '.join(found.bad_keys[:5]) or 'none'}; without a region in the crop: "
            f"{found.empty} (lower data.min_visible or raise data.crop_scale)"
        )


class RetryingReader:
    """Reads samples in spite of storage errors, in one process.

    A read is tried again `retries` times before its shard counts as lost, first after `pause` seconds and
    then after twice as long each time.
    """

    def __init__(self, dataset: Datasets, retries: int, pause: float) -> None:
        self._dataset, self._retries, self._pause = dataset, retries, pause
        self._lost: dict[int, float] = {}

    def read(self, index: int) -> RawSample:
        """Read sample `index`.

        Raises:
            LostShard: Its shard cannot be read, now or a short while ago.
            UserError: The index of the shard does not fit its tar.
        """
        shard = self._dataset.shard_of(index)
        name = self._dataset.info.shards[shard].name
        if time.monotonic() < self._lost.get(shard, 0.0):
            raise LostShard(f"{name} is skipped, it could not be read")
        tries = 1 if shard in self._lost else 1 + self._retries
        for attempt in range(tries):
            try:
                sample = self._dataset.read(index)
            except OSError as error:
                # A descriptor from before the fault may stay stale for ever.
                self._dataset.close()
                if attempt == tries - 1:
                    self._lost[shard] = time.monotonic() + RETRY_LOST_AFTER
                    raise LostShard(f"{name} is skipped after {tries} tries: {error}") from error
                time.sleep(self._pause * 2**attempt)
            else:
                self._lost.pop(shard, None)
                return sample
        raise AssertionError("unreachable: the last attempt returns or raises")
