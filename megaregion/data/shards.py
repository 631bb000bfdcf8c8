"""A dataset on disk: tar shards that `webdataset` can read, and an index to read any sample at once.

The folder holds shard-00000.tar ..., one shard-00000.index.npy for each, dataset.json and, where they
apply, centers.npy and tokenizer.model. KEY.jpg and KEY.json of a sample lie next to each other in the
tar, so that one read brings the header with the key, the image and the record. Several datasets are read as
one, whose samples are numbered one dataset after the other.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.config import DataConfig
from megaregion.data.info import CENTERS_NAME, ShardEntry, join, read_info
from megaregion.data.order import MixedOrder, Orders, SampleOrder
from megaregion.data.remote import Mirror, is_remote
from megaregion.data.sample import RegionRecord, SampleRecord
from megaregion.errors import UserError
from megaregion.files import file_sha256, known_sha256

HEADER = tarfile.BLOCKSIZE
"""Bytes in front of each member of a tar, its name among them."""
OPEN_SHARDS = 64
"""Shards that one process keeps open; more than any sensible data.window_shards."""


class RawSample(NamedTuple):
    """The stored bytes of one sample."""

    key: str
    image: bytes
    """The encoded image, KEY.jpg."""
    record: bytes
    """The content of KEY.json, for :func:`megaregion.data.sample.parse_sample`."""


class _OpenShard(NamedTuple):
    file: int
    """Descriptor of the tar; only pread uses it, so processes may share it after a fork."""
    rows: NDArray[np.int64]
    """Offset and size of the image, then of the record, [n, 4]."""


class ShardedDataset:
    """Reads any sample of a finished dataset with one read; safe to fork and to pickle.

    Args:
        folder: The dataset's folder, or the URL or command by which it is reached.
        check_labels: Whether to compare the hashes of centers and tokenizer with dataset.json.
        settings: The cache of a remote dataset.
        written: What ``written`` says in another process of this host, which has looked at the same files;
            None looks at every shard here.

    Raises:
        UserError: A shard is missing, empty or half-written, or a file is not the one packed.
    """

    def __init__(
        self,
        folder: Path | str,
        check_labels: bool = True,
        settings: DataConfig | None = None,
        written: Sequence[int] | None = None,
    ) -> None:
        remote = isinstance(folder, str) and is_remote(folder)
        self.mirror = Mirror(str(folder), settings or DataConfig()) if remote else None
        self.folder = self.mirror.folder if self.mirror else Path(folder)
        self.info = read_info(self.folder)
        self._starts = list(accumulate(self.info.shard_sizes, initial=0))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        # Those of a remote dataset are checked as they arrive.
        here = self.mirror is None and written is None
        self.written = self._check_sizes() if here else [*(written or ())]
        """When each shard was written, in nanoseconds."""
        if check_labels:
            for name, sha256 in self.info.label_files.items():
                self._check_hash(name, sha256, known=True)

    def __len__(self) -> int:
        return self.info.samples

    @property
    def parts(self) -> tuple[ShardedDataset]:
        """Itself, as the only part of what a run reads."""
        return (self,)

    @property
    def centers(self) -> list[tuple[int, Path]]:
        """The file of centers, which begins with class 0."""
        return [(0, self.folder / CENTERS_NAME)]

    def __getstate__(self) -> dict[str, object]:
        # Descriptors mean nothing in another process; it opens its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, index: int) -> RawSample:
        """Read sample `index` of the dataset.

        Raises:
            IndexError: The dataset is shorter.
            OSError: The storage fails.
            UserError: The index of the shard does not fit its tar.
        """
        number = self.shard_of(index)
        shard = self._shard(number)
        image, image_size, record, record_size = shard.rows[index - self._starts[number]].tolist()
        start = image - HEADER
        wanted = record + record_size - start
        # An image follows its header, and its record follows it.
        placed = start >= 0 and wanted > HEADER
        content = os.pread(shard.file, wanted, start) if placed else b""
        if placed and len(content) != wanted:
            raise UserError(f"{self._path(number, '.tar')} ends early; it was changed while in use")
        name = content[:100].rstrip(b"\0")
        if content[257:262] != b"ustar" or not name.endswith(b".jpg"):
            raise UserError(
                f"{self._path(number, '.index.npy')} does not fit its tar (no image begins at byte {image}); "
                "pack the shard again"
            )
        return RawSample(
            name.removesuffix(b".jpg").decode(errors="replace"),
            content[HEADER : HEADER + image_size],
            content[record - start :],
        )

    def labelled(self, index: int, key: str, record: SampleRecord) -> SampleRecord:
        """The record of a sample, each of whose labels is a class of the heads.

        Raises:
            UserError: A label lies outside its label space; the heads would learn nonsense from it.
        """
        for number, region in enumerate(record.regions):
            greatest = max(region.tokens) if region.label is None else max(region.labels)
            classes = self.info.text_classes if region.label is None else self.info.object_classes
            if greatest >= classes:
                raise UserError(
                    f"sample {key!r}, region {number}: {region.kind} label {greatest} is outside the label "
                    f"space of {classes} classes that dataset.json names; label and pack the dataset again"
                )
        return record

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Ask the system to bring these samples from the disk while others are decoded; never fails."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index in indices:
            # What is wrong with a shard is told when it is read.
            with contextlib.suppress(OSError, UserError):
                number = self.shard_of(index)
                if self.mirror is not None and number not in self._open:
                    continue  # It may be far away, and what is asked for must not wait.
                shard = self._shard(number)
                image, _, record, size = shard.rows[index - self._starts[number]].tolist()
                start = image - HEADER
                os.posix_fadvise(shard.file, start, record + size - start, os.POSIX_FADV_WILLNEED)

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds sample `index`.

        Raises:
            IndexError: The dataset is shorter.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        return bisect_right(self._starts, index) - 1

    def verify(self) -> None:
        """Hash every shard and read every key; for a check after a transfer, not for each start.

        Raises:
            UserError: A shard is not the one that was packed, or two samples share a key.
        """
        seen: set[str] = set()
        for number, shard in enumerate(self.info.shards):
            self._check_hash(f"{shard.name}.tar", shard.sha256)
            for index in range(self._starts[number], self._starts[number + 1]):
                key = self.read(index).key
                if key in seen:
                    raise UserError(f"{self.folder} holds the key {key!r} twice; keys must be unique")
                seen.add(key)

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        for shard in self._open.values():
            os.close(shard.file)
        self._open.clear()

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / f"{self.info.shards[number].name}{ending}"

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._path(number, ".index.npy")
        shard = self.info.shards[number]
        if self.mirror is not None:
            self.mirror.shard(shard)
            self._let_go()
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TokenError) as error:
            # numpy reads the header as Python source.
            raise UserError(f"{path} cannot be read ({error}); pack the shard again") from None
        fits = index.shape == (shard.samples, 4) and index.dtype == np.int64
        if not fits or not 0 <= index.min() <= index.max() <= shard.bytes:
            raise UserError(
                f"{path} must index {shard.samples} samples in {shard.bytes} bytes, got {index.dtype} "
                f"{index.shape}; pack the shard again"
            )
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1].file)
        # As a plain array over the same memory: each look at a memmap makes another memmap.
        opened = _OpenShard(os.open(self._path(number, ".tar"), os.O_RDONLY), np.asarray(index))
        try:
            self._check_unchanged(number, opened.file)
        except BaseException:
            os.close(opened.file)
            raise
        self._open[number] = opened
        return opened

    def _check_unchanged(self, number: int, file: int) -> None:
        """See that a shard is the one that dataset.json named when it was read, perhaps days ago."""
        found, shard = os.fstat(file), self.info.shards[number]
        if self.mirror is not None or found.st_mtime_ns == self.written[number]:
            return
        if found.st_size < shard.bytes:
            raise UserError(f"{self._path(number, '.tar')} ends early; it was changed while in use")
        try:
            self._check_hash(f"{shard.name}.tar", shard.sha256)
        except UserError as error:
            raise UserError(f"{error}; it was packed anew while this process was reading it") from None
        self.written[number] = found.st_mtime_ns  # A copy of the same bytes is hashed once.

    def _let_go(self) -> None:
        """Close shards that made room in the cache, for an open file keeps its bytes on the disk."""
        gone = [number for number, shard in self._open.items() if not os.fstat(shard.file).st_nlink]
        for number in gone:
            os.close(self._open.pop(number).file)

    def _check_sizes(self) -> list[int]:
        """See that every shard is whole; gives when each was written."""
        # The folder tells at once which of 90,000 files there are; only the tars are looked at one by one.
        with os.scandir(self.folder) as entries:
            found = {entry.name for entry in entries if entry.is_file()}
        return [self._check_size(shard, found) for shard in self.info.shards]

    def _check_size(self, shard: ShardEntry, found: AbstractSet[str]) -> int:
        tar, index = f"{shard.name}.tar", f"{shard.name}.index.npy"
        for name in (index, tar):
            if name not in found:
                raise UserError(
                    f"{self.folder}/{name} does not exist, but {self.folder}/dataset.json names it; "
                    "pack it again"
                )
        state = os.stat(f"{self.folder}/{tar}")  # noqa: PTH116
        if shard.samples < 1 or not state.st_size:
            raise UserError(f"{self.folder}/{tar} is empty; pack it again or take it out of dataset.json")
        if state.st_size != shard.bytes:
            raise UserError(
                f"{self.folder}/{tar} is half-written or changed: {state.st_size} bytes, but dataset.json "
                f"says {shard.bytes}; copy or pack it again"
            )
        return state.st_mtime_ns

    def _check_hash(self, name: str, expected: str, known: bool = False) -> None:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{path} does not exist, but the dataset was packed with it; copy it again")
        found = known_sha256(path) if known else file_sha256(path)
        if found != expected:
            raise UserError(
                f"{path} is not the file that the dataset was packed with (sha256 {found[:12]}, expected "
                f"{expected[:12]}); restore it or pack the dataset again"
            )


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


def _shifted(region: RegionRecord, first_object: int, first_text: int) -> RegionRecord:
    if region.label is None:
        return region._replace(tokens=tuple(token + first_text for token in region.tokens))
    others = tuple(label + first_object for label in region.others)
    return region._replace(label=region.label + first_object, others=others)
