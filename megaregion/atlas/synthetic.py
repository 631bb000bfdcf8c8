"""A synthetic source of any size: what an atlas of a million clusters is like, without a million clusters.

Everything is a function of the number of clusters and of the sample's number. Sizes follow a power law,
centers lie in families within families, and each cluster's regions show one shape of one colour.

Shapes: K clusters of C channels, s samples of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megaregion.atlas.source import ROW, Batch, Floats, Integers, Rows, Sample
from megaregion.data.order import mix
from megaregion.data.sample import RegionRecord, SampleRecord

VERSION = 1
"""Goes up when the same numbers would give another source."""
CHANNELS = 64
BLOCK = 2048
"""Samples that are made at once."""
WIDTH, HEIGHT = 384, 256
COLUMNS, ROWS = 6, 4
"""Regions stand in a grid of cells; those of the last row are text."""
OBJECTS, TEXTS = COLUMNS * (ROWS - 1), COLUMNS
PER_CLUSTER = 9
"""Regions of a cluster, on average."""
TOKENS = 4096
SKEW = 1.5
"""Exponent of the power law of the sizes."""


class _Block(NamedTuple):
    """What some consecutive samples hold; objects come first."""

    labels: Integers
    """Clusters, [s, OBJECTS]."""
    tokens: Integers
    """[s, TEXTS]"""
    closeness: Floats
    """[s, OBJECTS]"""
    boxes: NDArray[np.float64]
    """[s, OBJECTS + TEXTS, 4]"""


class SyntheticSource:
    """A source of K clusters without any file."""

    knows_closeness = True

    def __init__(self, clusters: int) -> None:
        self._clusters = clusters
        self.title = f"{clusters:,} synthetic clusters"
        self.identity = hashlib.sha256(f"synthetic {VERSION} {clusters}".encode()).hexdigest()
        self.samples = max(-(-clusters * PER_CLUSTER // OBJECTS), 16)

    def centers(self) -> Floats:
        """The centers, [K, C]."""
        rng = np.random.Generator(np.random.Philox(key=1))
        large, small = (
            rng.standard_normal((families, CHANNELS)).astype(np.float32)
            for families in (24, max(self._clusters // 400, 12))
        )
        centers = np.empty((self._clusters, CHANNELS), dtype=np.float32)
        for start in range(0, self._clusters, 65_536):
            number = np.arange(start, min(start + 65_536, self._clusters))
            rng = np.random.Generator(np.random.Philox(key=np.array([2, start], dtype=np.uint64)))
            family = (mix(number, 2) % np.uint64(len(small))).astype(np.int64)
            block = 0.45 * rng.standard_normal((len(number), CHANNELS)).astype(np.float32)
            block += 0.8 * small[family] + 1.4 * large[family * family % len(large)]
            centers[number] = block / np.linalg.norm(block, axis=1, keepdims=True)
        return centers

    def pieces(self) -> list[str]:
        """Words of two or three syllables."""
        first, second = ("ba", "ko", "li", "mu", "ne", "ra", "so", "ti"), ("do", "fe", "ga", "hi", "lu", "pa")
        words = []
        for number in range(TOKENS):
            word = "\u2581" if number % 2 else ""
            while True:
                word += first[number % 8] + second[number // 8 % 6]
                number //= 48
                if not number:
                    break
            words.append(word)
        return words

    def batches(self) -> Iterator[Batch]:
        """All regions."""
        for start in range(0, self.samples, BLOCK):
            count = min(BLOCK, self.samples - start)
            block = _block(self._clusters, start // BLOCK)
            objects = _rows(start, 0, block.labels[:count], block.closeness[:count])
            texts = _rows(start, OBJECTS, block.tokens[:count], np.float32(np.nan))
            yield Batch(count, objects, texts)

    def read(self, number: int) -> Sample:
        """Draw a sample."""
        block, row = _block(self._clusters, number // BLOCK), number % BLOCK
        labels = [*block.labels[row].tolist(), *block.tokens[row].tolist()]
        regions: list[RegionRecord] = []
        for (x0, y0, x1, y1), label in zip(block.boxes[row].tolist(), labels, strict=True):
            box = (x0, y0, x1, y1)
            if len(regions) < OBJECTS:
                regions.append(RegionRecord("object", box, label=label, score=0.9))
            else:
                word = self._words[label]
                regions.append(RegionRecord("text", box, tokens=(label,), text=word, score=0.95))
        record = SampleRecord(WIDTH, HEIGHT, tuple(regions))
        return Sample(f"synthetic-{number:08d}", _draw(record, number), record)

    @cached_property
    def _words(self) -> list[str]:
        return [piece.lstrip("\u2581") for piece in self.pieces()]


@lru_cache(maxsize=1)
def _block(clusters: int, number: int) -> _Block:
    rng = np.random.Generator(np.random.Philox(key=np.array([3, number], dtype=np.uint64)))
    rank = (rng.random((BLOCK, OBJECTS)) ** SKEW * clusters).astype(np.int64)
    # The largest clusters shall not be those of the lowest numbers.
    labels = rank * 2_654_435_761 % clusters
    tokens = (rng.random((BLOCK, TEXTS)) ** 2 * TOKENS).astype(np.int64)
    closeness = (0.45 + 0.5 * rng.beta(3, 2, (BLOCK, OBJECTS))).astype(np.float32)
    return _Block(labels, tokens, closeness, _boxes(rng))


def _rows(sample: int, region: int, labels: Integers, closeness: Floats | np.float32) -> Rows:
    """Rows of consecutive samples and regions that begin at these numbers, [s * n], of labels [s, n]."""
    rows = np.empty(labels.shape, ROW)
    rows["label"], rows["closeness"] = labels, closeness
    rows["sample"] = sample + np.arange(labels.shape[0])[:, None]
    rows["region"] = region + np.arange(labels.shape[1])
    return rows.ravel()


def _boxes(rng: np.random.Generator) -> NDArray[np.float64]:
    """A box in every cell of the grid, [s, OBJECTS + TEXTS, 4]."""
    side_x, side_y = WIDTH / COLUMNS, HEIGHT / ROWS
    cell = np.arange(COLUMNS * ROWS)
    left, top = cell % COLUMNS * side_x, cell // COLUMNS * side_y
    size = rng.uniform(0.55, 0.95, (BLOCK, COLUMNS * ROWS, 2)) * [side_x, side_y]
    slack = rng.uniform(0, 1, size.shape) * ([side_x, side_y] - size)
    corner = np.stack([left, top], axis=1) + slack
    return np.round(np.concatenate([corner, corner + size], axis=2), 1)


def _draw(record: SampleRecord, number: int) -> Image.Image:
    ground = int(mix(np.array([number]), 5)[0] % 64)
    image = Image.new("RGB", (WIDTH, HEIGHT), (150 + ground, 196, 214 - ground))
    draw = ImageDraw.Draw(image)
    for region in record.regions:
        x0, y0, x1, y1 = region.box
        if region.label is None:
            draw.rounded_rectangle(region.box, 5, fill=(246, 244, 238))
            font = ImageFont.load_default(13)
            draw.text((x0 + 4, (y0 + y1) / 2 - 7), region.text, fill=(30, 30, 40), font=font)
            continue
        looks = int(mix(np.array([region.label]), 6)[0])
        color = (40 + looks % 200, 40 + looks // 256 % 200, 40 + looks // 65_536 % 200)
        other = (235 - color[1] // 2, 235 - color[2] // 2, 235 - color[0] // 2)
        middle = ((x0 + x1) / 2, (y0 + y1) / 2, min(x1 - x0, y1 - y0) / 2)
        shape = looks // 2**24 % 4
        if shape == 0:
            draw.ellipse(region.box, fill=color)
        elif shape == 1:
            draw.rounded_rectangle(region.box, 8, fill=color)
        else:
            draw.regular_polygon(middle, 3 + looks // 2**28 % 4, rotation=looks // 2**32 % 90, fill=color)
        draw.circle(middle[:2], middle[2] * 0.4, fill=other)
    return image
