"""The loader beside plain webdataset with Pillow, and beside decoding and resizing alone."""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmark.measure import Stopwatch, passing_folder
from benchmark.part import CLOCK, FOLDER, Case, part
from megaregion.bounds import PositiveInt, Whole
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

WEBDATASET, ALONE = 2.0, 0.85
"""Least ratios to our time for an image: plain webdataset's, and that of decoding and resizing alone."""
RESUME_SECONDS = 2.0
"""What the first batch may take at position FAR."""
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
RESUMED = "first batch at position 10^9, beside the limit", "samples read for it, beside its images"


@part(
    ("--images", PositiveInt, 4096, "images of the dataset that is composed, 90 KB each"),
    ("--workers", Whole(1, 1024), 2, "processes that decode, of each side"),
    ("--batch", PositiveInt, 64, "images of a batch"),
    FOLDER,
    ("--repeats", PositiveInt, 3, "passes over the images of each side; the fastest counts"),
    CLOCK,
)
def loader(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """The loader beside plain webdataset with Pillow, and beside decoding and resizing alone.

    Photos of 640 x 480 pixels to crops of 224, each with twelve regions; all sides take the same crops of the
    same images in as many processes. Ratios are peer / ours. Plain webdataset decodes whole images with
    Pillow in its own loader, takes the same crops by the antialiased bicubic filter and finds the same
    regions; decoding and resizing alone starts from bytes in memory, with nothing before or after it. With
    the processor's clock, a pass takes the time of all processors over --workers.
    """
    least = options.workers * options.batch
    if options.images < least:
        raise UserError(f"--images must be at least --workers times --batch, {least}, got {options.images}")
    with passing_folder(options.folder) as folder:
        data = DataConfig(path=str(folder), workers=options.workers)
        if watch.counts:
            yield from _count_copy(data, options.images, options.batch, watch)
            return
        _write_photos(folder, options.images)
        yield from _compare_loaders(data, options.batch, options.repeats, watch)
        yield from _compare_resume(data, options.batch)


def _compare_loaders(data: DataConfig, batch: int, repeats: int, watch: Stopwatch) -> Iterator[Case]:
    """Read the same crops of all images in three ways."""
    folder, workers = Path(data.path), data.workers
    dataset = ShardedDataset(folder)
    order, transform = read_as_trained(dataset, data)
    steps = len(dataset) // batch
    on_gpu, positions = watch.device.type == "cuda", dict[str, int]()
    encoded: Share = []
    for position in range(len(dataset)):
        raw = dataset.read(order.sample(position))
        rng = seeded_rng(SEED, Purpose.AUGMENTATION, position)
        positions[raw.key] = position
        encoded.append((raw.image, transform.draw_crop(parse_sample(raw.record), rng, transform.model.grid)))
    shares = [encoded[rank::workers] for rank in range(workers)]
    shards = [str(folder / f"{shard.name}.tar") for shard in dataset.info.shards]

    def ours() -> None:
        reader = RegionLoader(dataset, order, transform, data)
        batches = reader.batches(range(step * batch, (step + 1) * batch) for step in range(steps))
        deque((one.to(watch.device).images for one in batches) if on_gpu else batches, maxlen=0)
        reader.close()

    def theirs() -> None:
        deque(_webdataset_batches(shards, positions, transform, workers, batch), maxlen=0)

    ways = {"ours": ours, "theirs": theirs, "alone": lambda: _decode_all(shares)}
    images = {"ours": steps * batch, "theirs": steps * batch, "alone": len(dataset)}
    found = {
        way: seconds / images[way] * 1e3 / (workers if watch.processor else 1)
        for way, seconds in watch.fastest(ways, repeats, left_out=0).items()
    }
    kilobytes = sum(shard.bytes for shard in dataset.info.shards) / len(dataset) / 1e3
    name = f"image of {kilobytes:.0f} KB, {workers} processes{', to the GPU' if on_gpu else ''}"
    yield Case(f"{name}: plain webdataset with Pillow", found["ours"], found["theirs"], "ms", WEBDATASET)
    yield Case(f"{name}: decoding and resizing alone", found["ours"], found["alone"], "ms", ALONE)


def _count_copy(data: DataConfig, images: int, batch: int, watch: Stopwatch) -> Iterator[Case]:
    """What a real batch asks of a GPU on its way there."""
    from megaregion.planning.fake_cuda import real_tensors

    with real_tensors():
        _write_photos(Path(data.path), images)
        dataset = ShardedDataset(Path(data.path))
        reader = RegionLoader(dataset, *read_as_trained(dataset, data), data)
        (first,) = reader.batches([range(batch)])
        reader.close()
    found = watch.fastest({"a batch to the GPU": lambda: first.to(watch.device).images}, 1)
    seconds = found["a batch to the GPU"]
    name, why = f"{batch} images to the GPU", "asks nothing of a GPU"
    yield Case(f"{name}: plain webdataset with Pillow", seconds, seconds, "ms", WEBDATASET)
    yield Case(f"{name}: decoding and resizing alone", 0, 0, "ms", ALONE, unmeasured=why)
    for told in RESUMED:
        yield Case(told, 0, 0, "", 1.0, unmeasured=why)


def _compare_resume(data: DataConfig, batch: int) -> Iterator[Case]:
    """Start at a far position and count what is read for the first batch."""
    began = time.perf_counter()
    dataset = CountedReads(Path(data.path))
    reader = RegionLoader(dataset, *read_as_trained(dataset, data), data)
    (first,) = reader.batches([range(FAR, FAR + batch)])
    seconds = time.perf_counter() - began
    reader.close()
    wanted = batch + first.found.bad + first.found.empty
    yield Case(RESUMED[0], seconds, RESUME_SECONDS, "s", 1.0)
    yield Case(RESUMED[1], dataset.reads.value, wanted, "samples", 1.0)


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


def read_as_trained(dataset: ShardedDataset, data: DataConfig) -> tuple[SampleOrder, Transform]:
    """Order and transform of a run over a dataset."""
    order = SampleOrder(dataset.info.shard_sizes, SEED, data.window_shards)
    return order, Transform(data, MODEL, SEED)


def _decode_all(shares: Sequence[Share]) -> None:
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
        .select(bool)
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
        record, _ = clip_regions(parse_sample(sample["json"]))
        return self.transform(sample["jpg"], record, self.positions[key], key)


def _stack(samples: Sequence[Sample]) -> dict[str, Tensor]:
    names = ("pixels", "visible", "kinds", "labels")
    found = {name: torch.from_numpy(np.stack([getattr(one, name) for one in samples])) for name in names}
    found["pixels"] = found["pixels"].permute(0, 3, 1, 2).contiguous()
    return {"positions": torch.tensor([sample.position for sample in samples]), **found}


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
    """The photos that need no more than a slight enlargement, lying on their long side, of the least size."""
    found = []
    for file in sorted((PACK / "backgrounds").iterdir()):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if max(image.size) >= 590:
            photo = image if image.width > image.height else image.rotate(90, expand=True)
            scale = max(WIDTH / photo.width, HEIGHT / photo.height)
            size = math.ceil(photo.width * scale), math.ceil(photo.height * scale)
            found.append(photo.resize(size, Image.Resampling.LANCZOS))
    return found


def _part(photo: Image.Image, rng: np.random.Generator) -> bytes:
    x, y = int(rng.integers(photo.width - WIDTH + 1)), int(rng.integers(photo.height - HEIGHT + 1))
    part = photo.crop((x, y, x + WIDTH, y + HEIGHT))
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
