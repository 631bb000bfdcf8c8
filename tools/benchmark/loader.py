"""The loader's rate beside its peers', and what a start far inside the stream costs.

Peers: plain `webdataset` in its own loader, which decodes whole images with Pillow, takes the same crops by
the antialiased bicubic filter and finds the same regions; and our decoding and resizing alone, of bytes in
memory, with nothing before or after it. Every side uses as many processes.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmark.loader_peer import webdataset_batches
from benchmark.report import Case
from megaregion.config import DataConfig, ModelConfig
from megaregion.data.image import Crop, decode_crop, open_image, stay_on_one_core
from megaregion.data.loader import RegionLoader
from megaregion.data.order import Purpose, SampleOrder, seeded_rng
from megaregion.data.sample import parse_sample
from megaregion.data.shards import RawSample, ShardedDataset
from megaregion.data.transforms import Transform

GOAL_WEBDATASET = 2.0
"""Least ratio of plain webdataset's time for an image to ours."""
GOAL_ALONE = 0.85
"""Least ratio of the time of decoding and resizing alone to ours."""
GOAL_RESUME_SECONDS = 2.0
FAR = 10**9
SEED = 0
MODEL = ModelConfig()

Share = list[tuple[bytes, Crop]]
"""Encoded images and what is cut from them."""


def compare_loaders(folder: Path, workers: int, batch: int, repeats: int, clock: Clock) -> list[Case]:
    """Read the same crops of all images in three ways, in turn.

    Args:
        folder: The dataset.
        workers: Processes of each way.
        batch: Images of a batch.
        repeats: Passes of each way; the fastest counts.
        clock: What is measured of a pass.
    """
    data = DataConfig(path=str(folder), workers=workers)
    dataset = ShardedDataset(folder)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    transform = Transform(data, MODEL, SEED)
    steps = len(dataset) // batch
    positions = {order.sample(position): position for position in range(len(dataset))}
    by_key = {dataset.read(index).key: position for index, position in positions.items()}
    encoded = _encoded(dataset, order, transform)
    shares = [encoded[rank::workers] for rank in range(workers)]
    shards = [str(folder / f"{shard.name}.tar") for shard in dataset.info.shards]
    ours, theirs, alone = [], [], []
    for _ in range(repeats):
        loader = RegionLoader(dataset, order, transform, data)
        plan = (range(step * batch, (step + 1) * batch) for step in range(steps))
        ours.append(clock(partial(_drain, loader.batches(plan), loader.close), steps * batch))
        peer = webdataset_batches(shards, by_key, transform, workers, batch)
        theirs.append(clock(partial(_drain, peer), steps * batch))
        alone.append(clock(partial(_alone, shares), len(dataset)))
    kilobytes = sum(shard.bytes for shard in dataset.info.shards) / len(dataset) / 1e3
    name = f"image of {kilobytes:.0f} KB, {workers} processes"
    return [
        Case(f"{name}: plain webdataset with Pillow", min(ours), min(theirs), GOAL_WEBDATASET, "ms"),
        Case(f"{name}: decoding and resizing alone", min(ours), min(alone), GOAL_ALONE, "ms"),
    ]


def compare_resume(folder: Path, workers: int, batch: int) -> list[Case]:
    """Start at position 10^9 and count what is read for the first batch."""
    began = time.perf_counter()
    dataset = CountedReads(folder)
    data = DataConfig(path=str(folder), workers=workers)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    loader = RegionLoader(dataset, order, Transform(data, MODEL, SEED), data)
    (first,) = loader.batches([range(FAR, FAR + batch)])
    seconds = time.perf_counter() - began
    loader.close()
    replaced = first.bad + first.empty
    return [
        Case("first batch at position 10^9, beside the limit", seconds, GOAL_RESUME_SECONDS, 1.0, "s"),
        Case("samples read for it, beside its images", dataset.reads.value, batch + replaced, 1.0, "samples"),
    ]


class CountedReads(ShardedDataset):
    """Counts the samples that this process and its workers read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads = multiprocessing.Value("q", 0)

    def read(self, index: int) -> RawSample:
        """Read a sample and count it."""
        with self.reads.get_lock():
            self.reads.value += 1
        return super().read(index)


@dataclass(frozen=True)
class Clock:
    """Milliseconds for an image: the wall's, or the time of all processors spent on it over the processes.

    On a machine that others use at the same time, the second is nearer to what the wall would show alone.
    """

    workers: int
    processor: bool = False

    def __call__(self, work: Callable[[], None], images: int) -> float:
        """Time a pass, the start and end of its processes included."""
        began = self._now()
        work()
        return (self._now() - began) / images * 1e3

    def _now(self) -> float:
        if not self.processor:
            return time.perf_counter()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used) / self.workers


def _drain(batches: Iterable[object], close: Callable[[], None] | None = None) -> None:
    for _ in batches:
        pass
    if close is not None:
        close()


def _encoded(dataset: ShardedDataset, order: SampleOrder, transform: Transform) -> Share:
    """Every image with the crop of its position."""
    found = []
    for position in range(len(dataset)):
        raw = dataset.read(order.sample(position))
        rng = seeded_rng(SEED, Purpose.AUGMENTATION, position)
        found.append((raw.image, transform.draw_crop(parse_sample(raw.record), rng, transform.model.grid)))
    return found


def _alone(shares: Sequence[Share]) -> None:
    """Decode and resize in as many processes as there are shares."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_decode, args=(share,)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _decode(share: Share) -> None:
    stay_on_one_core()
    for content, crop in share:
        decode_crop(open_image(content), crop, MODEL.image_size, MODEL.image_size, shrink=True)
