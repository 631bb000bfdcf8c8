"""Several datasets in one run: which stands at each position of the stream, and one space of labels for all.

The stream is cut among the datasets as nearly in the ratio of their weights as whole samples allow, at every
position and not only on average: the first takes position p where floor((p + 1) w / W) grows, and the others
share what is left in the same way. So a dataset's part, and how much of it went by, are sums of a few whole
numbers, whatever was drawn before.

Datasets that were labelled with the same centers or the same tokenizer share these classes; others follow one
another. A joined file of centers is known by the hash of the hashes of its parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from math import lcm
from pathlib import Path

from megaregion.config import DataConfig
from megaregion.data.info import CENTERS_NAME, DatasetInfo
from megaregion.data.order import SampleOrder
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.data.shards import RawSample, ShardedDataset
from megaregion.errors import UserError


class MixedOrder:
    """Which sample of the datasets, numbered one dataset after the other, stands at which position.

    Args:
        orders: The order of each dataset, in its own positions.
        weights: Shares of the stream, relative to each other.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[Fraction]) -> None:
        self.orders = tuple(orders)
        scale = lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        self._splits = [(own, sum(whole[number:])) for number, own in enumerate(whole)]
        self._firsts = list(accumulate((order.samples for order in orders), initial=0))
        self.samples = self._firsts[-1]

    def sample(self, position: int) -> int:
        """Index of the sample at a position, 0 <= position < 2**64."""
        number, own = self._place(position)
        return self._firsts[number] + self.orders[number].sample(own)

    def replacement(self, position: int, attempt: int) -> int:
        """As that of the dataset at a position: what stands in is of the same one, which keeps the ratio."""
        number, own = self._place(position)
        return self._firsts[number] + self.orders[number].replacement(own, attempt)

    def reached(self, position: int) -> list[int]:
        """Samples of each dataset before a position; also the position in its own order where it goes on."""
        counts = []
        for own, total in self._splits:
            counts.append(position * own // total)
            position -= counts[-1]
        return counts

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the dataset at a position, and the position in its own order."""
        for number, (own, total) in enumerate(self._splits):
            before = position * own // total
            if (position + 1) * own // total > before:
                return number, before
            position -= before
        raise AssertionError("unreachable: the last dataset takes all that is left")


class Mixture:
    """Several datasets, read as one.

    Raises:
        UserError: Their shards that are read at once do not fit the cache together.
    """

    def __init__(self, parts: Sequence[ShardedDataset], data: DataConfig) -> None:
        self.parts = tuple(parts)
        self.names = [path.rstrip("/").rpartition("/")[2] for path, _ in data.datasets]
        if len(set(self.names)) < len(self.names):
            self.names = [path for path, _ in data.datasets]
        self.folder = ", ".join(str(part.folder) for part in parts)
        self.info, self._shifts = join([part.info for part in parts], self.names)
        self._weights = [weight for _, weight in data.datasets]
        self._first_shards = list(accumulate((len(part.info.shards) for part in parts), initial=0))
        need = sum(part.mirror.window_bytes for part in parts if part.mirror is not None)
        if need > data.cache_bytes:
            raise UserError(
                f"data.cache_bytes must hold the shards of all datasets that are read at once, {need:,} "
                f"bytes, got {data.cache_bytes:,}; raise it, or lower data.window_shards"
            )

    def __len__(self) -> int:
        return self.info.samples

    def __str__(self) -> str:
        """Share of the stream and classes of each, for the log."""
        told = []
        for name, part, weight, (objects, texts) in zip(
            self.names, self.parts, self._weights, self._shifts, strict=True
        ):
            spaces = (objects, part.info.object_classes, "object"), (texts, part.info.text_classes, "text")
            classes = [
                f"{kind} classes {first} to {first + count - 1}" for first, count, kind in spaces if count
            ]
            share = float(weight / sum(self._weights))
            told.append(f"{name}: {share:.1%} of the stream, {len(part)} samples, {', '.join(classes)}")
        return "; ".join(told)

    @property
    def centers(self) -> list[tuple[int, Path]]:
        """The files of centers, each with the first class that is its own."""
        files: dict[int, Path] = {}
        for part, (first, _) in zip(self.parts, self._shifts, strict=True):
            if part.info.object_classes:
                files.setdefault(first, part.folder / CENTERS_NAME)
        return sorted(files.items())

    def read(self, index: int) -> RawSample:
        """As :meth:`ShardedDataset.read`."""
        number, own = self._own(index)
        return self.parts[number].read(own)

    def labelled(self, index: int, key: str, record: SampleRecord) -> SampleRecord:
        """The record of a sample with the labels of the joined spaces.

        Raises:
            UserError: A label lies outside the label space of its dataset.
        """
        number, own = self._own(index)
        checked = self.parts[number].labelled(own, key, record)
        shift = self._shifts[number]
        if shift == (0, 0):
            return checked
        return checked._replace(regions=tuple(_shifted(region, *shift) for region in checked.regions))

    def read_ahead(self, indices: Sequence[int]) -> None:
        """As :meth:`ShardedDataset.read_ahead`."""
        for index in indices:
            number, own = self._own(index)
            self.parts[number].read_ahead([own])

    def shard_of(self, index: int) -> int:
        """Number, among the shards of all datasets, of the one that holds a sample."""
        number, own = self._own(index)
        return self._first_shards[number] + self.parts[number].shard_of(own)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        for part in self.parts:
            part.close()

    def _own(self, index: int) -> tuple[int, int]:
        for number, part in enumerate(self.parts):
            if index < len(part):
                return number, index
            index -= len(part)
        raise IndexError(f"sample {index + len(self)} of datasets of {len(self)}")


Datasets = ShardedDataset | Mixture
Orders = SampleOrder | MixedOrder


def open_datasets(
    data: DataConfig, check_labels: bool = True, written: Sequence[Sequence[int]] | None = None
) -> Datasets:
    """The dataset of data.path, or all of them; other arguments as of :class:`ShardedDataset`, a part each.

    Raises:
        UserError: One cannot be used.
    """
    known: Sequence[Sequence[int] | None] = written or [None] * len(data.datasets)
    parts = [
        ShardedDataset(path, check_labels, data, one)
        for (path, _), one in zip(data.datasets, known, strict=True)
    ]
    return parts[0] if len(parts) == 1 else Mixture(parts, data)


def order_of(datasets: Datasets, data: DataConfig, seed: int) -> Orders:
    """The order of a dataset, or of several by their weights."""
    orders = [SampleOrder(part.info.shard_sizes, seed, data.window_shards) for part in datasets.parts]
    return orders[0] if len(orders) == 1 else MixedOrder(orders, [weight for _, weight in data.datasets])


def join(infos: Sequence[DatasetInfo], names: Sequence[str]) -> tuple[DatasetInfo, list[tuple[int, int]]]:
    """What dataset.json would say of all, and the first object and text class of each."""
    objects, object_classes, centers = _joined([(i.centers_sha256, i.object_classes) for i in infos])
    texts, text_classes, tokenizer = _joined([(i.tokenizer_sha256, i.text_classes) for i in infos])
    shards = [
        replace(shard, name=f"{name}/{shard.name}")
        for name, info in zip(names, infos, strict=True)
        for shard in info.shards
    ]
    info = DatasetInfo(
        samples=sum(info.samples for info in infos),
        objects=sum(info.objects for info in infos),
        texts=sum(info.texts for info in infos),
        object_classes=object_classes,
        text_classes=text_classes,
        centers_sha256=centers,
        tokenizer_sha256=tokenizer,
        shards=tuple(shards),
    )
    return info, list(zip(objects, texts, strict=True))


def _joined(files: Sequence[tuple[str | None, int]]) -> tuple[list[int], int, str | None]:
    """The first class of each dataset, the number of all classes, and the hash of what they come from."""
    firsts: list[int] = []
    known: dict[str, int] = {}
    total = 0
    for number, (sha256, classes) in enumerate(files):
        source = sha256 or f"dataset {number}"
        if classes and source not in known:
            known[source] = total
            total += classes
        firsts.append(known.get(source, 0))
    if len(known) < 2:
        return firsts, total, next((sha256 for sha256, classes in files if classes), None)
    return firsts, total, hashlib.sha256("\n".join(known).encode()).hexdigest()


def _shifted(region: RegionRecord, first_object: int, first_text: int) -> RegionRecord:
    if region.label is None:
        return region._replace(tokens=tuple(token + first_text for token in region.tokens))
    others = tuple(label + first_object for label in region.others)
    return region._replace(label=region.label + first_object, others=others)
