"""The loader beside plain webdataset with Pillow, and beside decoding and resizing alone.

Photos of 640 x 480 pixels to crops of 224, each with twelve regions; all sides take the same crops of the
same images in as many processes. Ratios are peer / ours. Plain webdataset decodes whole images with
Pillow in its own loader, takes the same crops by the antialiased bicubic filter and finds the same
regions; decoding and resizing alone starts from bytes in memory, with nothing before or after it. With
the processor's clock, a pass takes the time of all processors over --workers.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmark.measure import add_clock, describe_host
from benchmark.report import Case, Report
from megaregion.command_line import path, whole
from megaregion.config import DataConfig, ModelConfig
from megaregion.data.batch import Sample
from megaregion.data.image import Crop, decode_crop, open_image, stay_on_one_core
from megaregion.data.loader import RegionLoader
from megaregion.data.order import Purpose, SampleOrder, seeded_rng
from megaregion.data.sample import RegionRecord, SampleRecord, clip_regions, parse_sample
from megaregion.data.shards import RawSample, ShardedDataset
from megaregion.data.transforms import Transform
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.demo.assets import PACK
from megaregion.errors import UserError

GOAL_WEBDATASET = 2.0
"""Least ratio of plain webdataset's time for an image to ours."""
GOAL_ALONE = 0.85
"""Least ratio of the time of decoding and resizing alone to ours."""
GOAL_RESUME_SECONDS = 2.0
FAR = 10**9
SEED = 0
MODEL = ModelConfig()

WIDTH, HEIGHT = 640, 480
QUALITY = 90
SHARDS = 8
CLASSES, TOKENS = 1_000, 500
OBJECTS, TEXTS = 9, 3

Share = list[tuple[bytes, Crop]]
"""Encoded images and what is cut from them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this part's flags."""
    add = parser.add_argument
    add("--images", type=whole(), default=4096, help="images of the dataset that is composed, 90 KB each")
    add("--workers", type=whole(1, 1024), default=2, help="processes that decode, of each side")
    add("--batch", type=whole(), default=64, help="images of a batch")
    add("--folder", type=path, default=Path(), help="folder on the disk to read from; emptied afterwards")
    add("--repeats", type=whole(), default=3, help="passes over the images of each side; the fastest counts")
    add_clock(parser)


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Compose the photos and read them all ways.

    Raises:
        UserError: A flag is out of range.
    """
    workers, batch = options.workers, options.batch
    if options.images < workers * batch:
        raise UserError(
            f"--images must be at least --workers times --batch, {workers * batch}, got {options.images}"
        )
    report = Report(describe_host(device, workers=workers, clock=options.clock, folder=str(options.folder)))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as name:
        folder = Path(name)
        _write_photos(folder, options.images)
        clock = Clock(workers, options.clock == "processor")
        report.cases += _compare_loaders(folder, workers, batch, options.repeats, clock)
        report.cases += _compare_resume(folder, workers, batch)
    return report


def _compare_loaders(folder: Path, workers: int, batch: int, repeats: int, clock: Clock) -> list[Case]:
    """Read the same crops of all images in three ways, in turn; the fastest pass of each counts."""
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
        peer = _webdataset_batches(shards, by_key, transform, workers, batch)
        theirs.append(clock(partial(_drain, peer), steps * batch))
        alone.append(clock(partial(_alone, shares), len(dataset)))
    kilobytes = sum(shard.bytes for shard in dataset.info.shards) / len(dataset) / 1e3
    name = f"image of {kilobytes:.0f} KB, {workers} processes"
    return [
        Case(f"{name}: plain webdataset with Pillow", min(ours), min(theirs), GOAL_WEBDATASET, "ms"),
        Case(f"{name}: decoding and resizing alone", min(ours), min(alone), GOAL_ALONE, "ms"),
    ]


def _compare_resume(folder: Path, workers: int, batch: int) -> list[Case]:
    """Start at position 10^9 and count what is read for the first batch."""
    began = time.perf_counter()
    dataset = CountedReads(folder)
    data = DataConfig(path=str(folder), workers=workers)
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    loader = RegionLoader(dataset, order, Transform(data, MODEL, SEED), data)
    (first,) = loader.batches([range(FAR, FAR + batch)])
    seconds = time.perf_counter() - began
    loader.close()
    replaced = first.found.bad + first.found.empty
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


def _webdataset_batches(
    shards: Sequence[str], positions: Mapping[str, int], transform: Transform, workers: int, batch: int
) -> Iterable[dict[str, Tensor]]:
    """All images once, in the order of the shards, as most projects read them; crops and regions are ours."""
    dataset = (
        webdataset.WebDataset(list(shards), shardshuffle=False)
        .decode("pil", only=["jpg"])
        .map(_Plain(positions, transform))
        .select(_is_usable)
        .batched(batch, collation_fn=_stack, partial=False)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


@dataclass(frozen=True)
class _Plain:
    """Our transform of an image that is decoded whole."""

    positions: Mapping[str, int]
    transform: Transform

    def __call__(self, sample: dict[str, Any]) -> Sample | None:
        key: str = sample["__key__"]
        image: Image.Image = sample["jpg"]
        record, _ = clip_regions(parse_sample(sample["json"]))
        return self.transform(image, record, self.positions[key], key)


def _is_usable(sample: Sample | None) -> bool:
    return sample is not None


def _stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return {
        "positions": torch.tensor([sample.position for sample in samples]),
        "pixels": pixels.permute(0, 3, 1, 2).contiguous(),
        **{
            name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples]))
            for name in ("visible", "kinds", "labels")
        },
    }


def _write_photos(folder: Path, samples: int) -> None:
    """Write a dataset of photos; a sample is another part, or the mirror, of one of the demo's."""
    rng = np.random.default_rng(0)
    photos = _photos()
    entries = []
    for shard in range(SHARDS):
        with ShardWriter(folder, f"shard-{shard:05d}") as writer:
            for index in range(shard, samples, SHARDS):
                writer.add(f"photo{index:06d}", _part(photos[index % len(photos)], rng), _record(rng))
        entries.append(writer.entry)
    write_dataset(folder, entries, CLASSES, TOKENS)


def _photos() -> list[Image.Image]:
    """The photos that need no more than a slight enlargement, lying on their long side."""
    found = []
    for file in sorted((PACK / "backgrounds").iterdir()):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if max(image.size) >= 590:
            found.append(image if image.width > image.height else image.rotate(90, expand=True))
    return found


def _part(photo: Image.Image, rng: np.random.Generator) -> bytes:
    scale = max(WIDTH / photo.width, HEIGHT / photo.height)
    size = math.ceil(photo.width * scale), math.ceil(photo.height * scale)
    large = photo.resize(size, Image.Resampling.LANCZOS)
    x, y = int(rng.integers(size[0] - WIDTH + 1)), int(rng.integers(size[1] - HEIGHT + 1))
    part = large.crop((x, y, x + WIDTH, y + HEIGHT))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stream = io.BytesIO()
    part.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _record(rng: np.random.Generator) -> SampleRecord:
    regions = []
    for number in range(OBJECTS + TEXTS):
        w, h = rng.uniform(60, 320), rng.uniform(40, 240)
        x, y = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
        box = (round(x, 1), round(y, 1), round(x + w, 1), round(y + h, 1))
        if number < OBJECTS:
            regions.append(RegionRecord("object", box, int(rng.integers(CLASSES)), score=0.9))
        else:
            tokens = tuple(rng.integers(TOKENS, size=3).tolist())
            regions.append(RegionRecord("text", box, None, tokens, 0.9, "EXIT"))
    return SampleRecord(WIDTH, HEIGHT, tuple(regions))
