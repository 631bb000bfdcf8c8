"""Batches for a list of positions, prepared by worker processes.

Each worker turns whole batches of positions into tensors; since every sample is a function of its
position, batches come out the same for any number of workers, none included. A sample that cannot be
used is replaced by the order's rule, counted and named in its batch; too many stop the run.

Workers ignore the signals that ask a run to save and stop: whoever signals a job reaches all of its
processes, and a loader that dies first would cost the run its last checkpoint.
"""

from __future__ import annotations

import atexit
import gc
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from megaregion.config import DataConfig
from megaregion.data.ahead import ReadAhead
from megaregion.data.batch import Batch, TransformedSample, collate
from megaregion.data.image import open_image, stay_on_one_core
from megaregion.data.order import SampleOrder
from megaregion.data.patience import LostShard, PatientReader
from megaregion.data.sample import BadSample, SampleRecord, clip_regions, parse_sample
from megaregion.data.shards import DatasetInfo, ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.errors import UserError

MAX_TRIES = 100
"""Samples tried for one position, the first included."""
JUDGED_SAMPLES = 1_000
"""The share of bad samples is judged over at least so many, lest one early find stop a run."""
RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the run's main process answers for its workers."""


@dataclass(frozen=True)
class Failure:
    """What ends a run, found in a worker; an exception would arrive wrapped in a traceback."""

    text: str
    storage: bool = False
    """Whether the storage failed, which a later start may find mended; else it is a user's mistake."""

    def to_error(self) -> UserError | LostShard:
        """The exception that tells the run."""
        return (LostShard if self.storage else UserError)(self.text)


@dataclass
class _Finds:
    """What came to light while a batch was read."""

    bad_keys: list[str] = field(default_factory=list)
    bad_reasons: list[str] = field(default_factory=list)
    empty: int = 0
    dropped_regions: int = 0
    lost: int = 0


class _Positions(Dataset[Batch]):
    """Turns lists of positions into batches; this is what runs in a worker."""

    def __init__(
        self,
        dataset: ShardedDataset,
        order: SampleOrder,
        transform: Transform,
        config: DataConfig,
        skips_lost: bool,
    ) -> None:
        self.dataset, self.order, self.transform, self.config = dataset, order, transform, config
        self.skips_lost = skips_lost
        self.reader = PatientReader(dataset, config.read_retries, config.read_pause)
        self.ahead = ReadAhead(dataset.mirror, order) if dataset.mirror is not None else None

    def __getitems__(self, positions: Sequence[int]) -> Batch | Failure:
        finds = _Finds()
        if self.ahead is not None:
            self.ahead.reached(positions[0])
        indices = [self.order.sample(position) for position in positions]
        self.dataset.read_ahead(indices)
        samples = (self._sample(*place, finds) for place in zip(positions, indices, strict=True))
        try:
            batch = collate(samples, len(positions), self.config.mean, self.config.std)
        except (UserError, LostShard) as error:
            return Failure(str(error), storage=isinstance(error, LostShard))
        return replace(batch, **vars(finds))

    def _sample(self, position: int, index: int, finds: _Finds) -> TransformedSample:
        for attempt in range(1, MAX_TRIES + 1):
            try:
                raw = self.reader.read(index)
            except LostShard as reason:
                if not self.skips_lost or attempt == MAX_TRIES:
                    raise
                finds.lost += 1
                finds.bad_keys.append(f"sample {index}")
                finds.bad_reasons.append(str(reason))
                index = self.order.replacement(position, attempt)
                continue
            try:
                record, dropped = clip_regions(parse_sample(raw.record))
                check_labels(raw.key, record, self.dataset.info)
                sample = self.transform(open_image(raw.image), record, position, raw.key)
            except BadSample as reason:
                finds.bad_keys.append(raw.key)
                finds.bad_reasons.append(str(reason))
            else:
                finds.dropped_regions += dropped
                if sample is not None:
                    return sample
                finds.empty += 1
            index = self.order.replacement(position, attempt)
        raise UserError(
            f"{self.dataset.folder} gave no usable sample in {MAX_TRIES} tries for position {position}; "
            f"bad samples: {', '.join(finds.bad_keys[:5]) or 'none'}; without a region in the crop: "
            f"{finds.empty} (lower data.min_visible or raise data.crop_scale)"
        )


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
        self._positions = _Positions(dataset, order, transform, config, skips_lost)
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
        loader = DataLoader(
            self._positions,
            batch_sampler=cast(Any, positions),  # its type says list; any sequence passes through
            num_workers=workers,
            collate_fn=_as_it_is,
            prefetch_factor=self._config.prefetch if workers else None,
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
                f"{self._bad} of {self._seen} samples of {self._positions.dataset.folder} could not be used, "
                f"more than data.max_bad_share {self._config.max_bad_share} allows; the last ones: {named}"
            )
            raise Failure(text, storage=batch.lost > 0).to_error()


def check_labels(key: str, record: SampleRecord, info: DatasetInfo) -> None:
    """Check that every label of a sample is a class of the heads.

    Raises:
        UserError: A label lies outside its label space; the heads would learn nonsense from it.
    """
    for number, region in enumerate(record.regions):
        greatest = max(region.tokens) if region.label is None else region.label
        classes = info.text_classes if region.label is None else info.object_classes
        if greatest >= classes:
            raise UserError(
                f"sample {key!r}, region {number}: {region.kind} label {greatest} is outside the label space "
                f"of {classes} classes that dataset.json names; label and pack the dataset again"
            )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    stay_on_one_core()
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
