"""A dataset of photos to measure a loader with: the demo's photos at 640 x 480, each with a dozen regions."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.writer import ShardWriter, write_dataset
from megaregion.demo.assets import PACK

WIDTH, HEIGHT = 640, 480
QUALITY = 90
SHARDS = 8
CLASSES, TOKENS = 1_000, 500
OBJECTS, TEXTS = 9, 3


def write_photos(folder: Path, samples: int) -> None:
    """Write a dataset of photos; a sample is another part, or the mirror, of one of them.

    Args:
        folder: Where to.
        samples: Images, at least one for each of the eight shards.
    """
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
    for path in sorted((PACK / "backgrounds").iterdir()):
        with Image.open(path) as opened:
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
