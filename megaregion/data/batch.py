"""A batch: the samples of some positions as tensors, in one piece of memory that passes between processes.

A worker process writes samples where the training process will read them, and what travels is the number of
a piece and the layout. Memory that is fresh for each batch would cost a page fault for every 4 KB on both
sides, and a file that has to be passed along. Here all files are opened before the workers are forked; they
lie in no file system, so that a small /dev/shm is no limit.

Shapes: B samples, N regions of each, P patches in row-major order, T label slots, H x W pixels.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.utils.data import get_worker_info

from megaregion.config import DataConfig
from megaregion.data.image import Crop
from megaregion.files import write_bytes

OBJECT, TEXT = 0, 1
"""Values of Batch.kinds."""

TENSORS = ("positions", "pixels", "visible", "kinds", "labels")
"""Fields of a batch that are tensors."""

ALIGNMENT = 64
"""Bytes of a cache line; every tensor begins on one."""

GROWTH = 1 << 20
"""Bytes by which a piece grows at least; packed batches differ in length."""

NO_PIXELS: NDArray[np.uint8] = np.empty((0, 0, 3), dtype=np.uint8)

Color = tuple[float, float, float]
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Type and shape of each tensor of a block, by its name."""


class Sample(NamedTuple):
    """One sample, first without its pixels and then ready to be stacked."""

    key: str
    position: int
    crop: Crop
    rows: int
    """Patches from top to bottom."""
    columns: int
    """Patches from left to right."""
    factors: tuple[float, ...]
    """Of brightness, contrast and saturation; empty where nothing changes."""
    visible: NDArray[np.bool_]
    """[N, P]."""
    kinds: NDArray[np.int8]
    """[N]."""
    labels: NDArray[np.int64]
    """[N, T], padded with -1."""
    pixels: NDArray[np.uint8] = NO_PIXELS
    """RGB, [H, W, 3]."""


@dataclass
class Findings:
    """What came to light while the samples of a batch were read."""

    bad_keys: list[str] = field(default_factory=list)
    """Samples that could not be used and were replaced."""
    bad_reasons: list[str] = field(default_factory=list)
    """What was wrong with each of `bad_keys`."""
    empty: int = 0
    """Samples replaced because their crop held no region; nothing is wrong with them."""
    dropped_regions: int = 0
    """Regions left out because their box has no area inside its image."""
    lost: int = 0
    """Samples of `bad_keys` whose shard could not be read."""

    @property
    def bad(self) -> int:
        """Number of samples that could not be used and were replaced."""
        return len(self.bad_keys)

    def add_bad(self, key: str, reason: Exception) -> None:
        """Note a sample that cannot be used."""
        self.bad_keys.append(key)
        self.bad_reasons.append(str(reason))


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of consecutive positions.

    Pixels travel as bytes, a quarter of the floats, between processes and to the device; `images`
    makes the floats where the batch is.
    """

    positions: Tensor
    """Places in the stream, int64 [B]."""
    keys: list[str]
    """Names of the samples, B of them."""
    pixels: Tensor
    """RGB, uint8 [B, 3, H, W]; of a packed batch the patches of all images in turn, [S, 3, p, p]."""
    visible: Tensor
    """True where a region sees a patch, bool [B, N, P]; of a packed batch [N, S]."""
    kinds: Tensor
    """OBJECT or TEXT, int8 [B, N]."""
    labels: Tensor
    """Positive classes, int64 [B, N, T], padded with -1."""
    mean: Color
    """Subtracted from R, G, B on the 0..1 scale."""
    std: Color
    """Divides R, G, B on the 0..1 scale."""
    grids: tuple[tuple[int, int], ...] | None = None
    """Rows and columns of each image's patches in a packed batch; None where all images have one size."""
    found: Findings = field(default_factory=Findings)
    block: Block | None = field(default=None, repr=False)
    """The memory in which all tensors lie, where it is one piece."""

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        # The tensors are views of the block: sent one by one, each would cost a file descriptor.
        sent = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.block is not None:
            sent = {name: value for name, value in sent.items() if name not in TENSORS}
        return _rebuild, (sent,)

    @cached_property
    def images(self) -> Tensor:
        """Normalised pixels, float32 [B, 3, H, W], on the batch's device."""
        return normalise(self.pixels, self.mean, self.std)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory the host does not wait, nor does what a GPU computes."""
        if (device := torch.device(device)).type != "cuda":
            return self._each(lambda tensor: tensor.to(device))
        copies, computes = _copying(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(copies):
            sent = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        computes.wait_stream(copies)
        for name in TENSORS:  # Or the memory would be taken again by the next copy.
            getattr(sent, name).record_stream(computes)
        return sent

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies on its own; DataLoader calls it."""
        if self.block is None:
            return self._each(Tensor.pin_memory)
        block = self.block.pin_memory()
        return replace(self, block=block, **block.tensors())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: Any = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, block=None, **changed)


def _rebuild(sent: dict[str, Any]) -> Batch:
    block: Block | None = sent["block"]
    return Batch(**sent, **({} if block is None else block.tensors()))


def collate(
    samples: Iterable[Sample], count: int, data: DataConfig, found: Findings, pool: Pool | None = None
) -> Batch:
    """Stack samples of one size, or, in native packing, put the patches of all into one sequence.

    Stacked samples are written into the batch one by one as they come, so that their own memory is used
    again for the next and stays in the processor's cache. A worker process takes the batch's memory from
    the pool.
    """
    rest = iter(samples)
    first = next(rest)
    samples = chain((first,), rest)
    grids, size = None, first.pixels.shape[:2]
    pixels, visible = (count, 3, *size), (count, *first.visible.shape)
    packed = data.packing == "native"
    if packed:
        # All are needed to know how long their sequence is.
        samples = list(samples)
        grids = tuple((sample.rows, sample.columns) for sample in samples)
        length, side = sum(rows * columns for rows, columns in grids), size[0] // first.rows
        pixels, visible = (length, 3, side, side), (len(first.kinds), length)
    layout = {
        "positions": (torch.int64, (count,)),
        "pixels": (torch.uint8, pixels),
        "visible": (torch.bool, visible),
        "kinds": (torch.int8, (count, len(first.kinds))),
        "labels": (torch.int64, (count, *first.labels.shape)),
    }
    block = Block.of(layout, pool)
    tensors = block.tensors()
    keys = _write(samples, {name: tensor.numpy() for name, tensor in tensors.items()}, packed)
    return Batch(keys=keys, mean=data.mean, std=data.std, grids=grids, found=found, block=block, **tensors)


def _write(samples: Iterable[Sample], arrays: Mapping[str, NDArray[Any]], packed: bool) -> list[str]:
    """Write samples into the batch's memory; returns their keys."""
    keys, start = [], 0
    for row, sample in enumerate(samples):
        keys.append(sample.key)
        arrays["positions"][row] = sample.position
        arrays["kinds"][row], arrays["labels"][row] = sample.kinds, sample.labels
        if packed:
            start = _pack(sample, start, arrays["pixels"], arrays["visible"])
        else:
            # OpenCV parts the colours four times as fast as a transposing copy.
            cv2.split(sample.pixels, list(arrays["pixels"][row]))
            arrays["visible"][row] = sample.visible
    return keys


def _pack(sample: Sample, start: int, pixels: NDArray[np.uint8], visible: NDArray[np.bool_]) -> int:
    """Write patches from `start` on into pixels [S, 3, p, p] and visible [N, S]; returns their end."""
    rows, columns, side = sample.rows, sample.columns, pixels.shape[-1]
    place = slice(start, start + rows * columns)
    patches = sample.pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    pixels[place] = patches.reshape(rows * columns, 3, side, side)
    visible[:, place] = sample.visible
    return place.stop


def normalise(pixels: Tensor, mean: Color, std: Color) -> Tensor:
    """Bring bytes, uint8 [..., 3, H, W], to zero mean and unit deviation, float32 on the same device."""
    shift, deviation = _statistics(mean, std, pixels.device)
    return pixels.to(torch.float32).sub_(shift).div_(deviation)


@lru_cache(maxsize=8)
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream by which batches go to a GPU, beside what it computes."""
    return torch.cuda.Stream(device)


@lru_cache(maxsize=8)
def _statistics(mean: Color, std: Color, device: torch.device) -> Tensor:
    """Mean and deviation of bytes, [2, 3, 1, 1]; once, since copying numbers to a GPU waits for it."""
    return torch.tensor((mean, std), dtype=torch.float32, device=device).view(2, 3, 1, 1) * 255


@dataclass(frozen=True, eq=False)
class Block:
    """One piece of memory and the tensors that lie in it."""

    memory: Tensor
    """uint8 [bytes]."""
    layout: Layout
    lease: Lease | None = None
    """How another process opens the memory, if it is a pool's and this process took it."""

    @staticmethod
    def of(layout: Layout, pool: Pool | None = None) -> Block:
        """Allocate a block with unspecified content.

        A worker process takes memory from the pool; while all of it is in use the block gets its own, which
        is copied through the pipe when it is sent.
        """
        size = sum(_aligned(math.prod(shape) * dtype.itemsize) for dtype, shape in layout.values())
        worker = get_worker_info()
        if worker is not None and pool is not None and (taken := pool.take(worker.id, size)) is not None:
            lease, memory = taken
            return Block(memory, layout, lease)
        return Block(torch.empty(size, dtype=torch.uint8), layout)

    def __reduce__(self) -> tuple[Callable[..., Block], tuple[Any, ...]]:
        # A tensor would be copied to /dev/shm; where that is full, the queue's thread only complains on
        # stderr, and the reader would wait for ever.
        return _received, (self.lease or self.memory.numpy(), self.layout)

    def tensors(self) -> dict[str, Any]:
        """The tensors by name, as views of the block."""
        views, start = {}, 0
        for name, (dtype, shape) in self.layout.items():
            size = math.prod(shape) * dtype.itemsize
            views[name] = self.memory[start : start + size].view(dtype).view(shape)
            start += _aligned(size)
        return views

    def pin_memory(self) -> Block:
        """A copy in page-locked memory, from which a GPU copies on its own."""
        return Block(self.memory.pin_memory(), self.layout)


def _received(memory: Lease | NDArray[np.uint8], layout: Layout) -> Block:
    return Block(memory.open() if isinstance(memory, Lease) else torch.from_numpy(memory), layout)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_NUMBERS = itertools.count()
_POOLS: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()


class Lease(NamedTuple):
    """What a process tells another of a piece that it has filled."""

    pool: int
    """Number of the pool."""
    piece: int
    size: int
    """Bytes in use, from the first on."""

    def open(self) -> Tensor:
        """The piece's memory, uint8 [size]; it is free again when the last tensor that views it is gone."""
        return _POOLS[self.pool].open(self)


class Pool:
    """Pieces of shared memory, the same number for each of the worker processes that will be forked.

    A piece is marked as taken by its worker and as free by the process that reads; since each of the two
    waits for the other's mark, no lock is needed.
    """

    def __init__(self, workers: int, pieces: int) -> None:
        self.number = next(_NUMBERS)
        self._pieces = pieces
        self._files = [os.memfd_create("batch") for _ in range(workers * pieces)]
        self._taken = mmap.mmap(-1, workers * pieces)
        self._memory: dict[int, mmap.mmap] = {}
        _POOLS[self.number] = self

    def take(self, worker: int, size: int) -> tuple[Lease, Tensor] | None:
        """Take a free piece of `size` bytes, in the process of a worker.

        Returns:
            The piece and its memory, uint8 [size], with unspecified content; None while all are in use.
        """
        first = worker * self._pieces
        piece = self._taken.find(b"\0", first, first + self._pieces)
        if piece < 0:
            return None
        self._taken[piece] = 1
        if os.fstat(self._files[piece]).st_size < size:
            os.ftruncate(self._files[piece], -(-size // GROWTH) * GROWTH)
        return Lease(self.number, piece, size), torch.from_numpy(self._array(piece, size))

    def open(self, lease: Lease) -> Tensor:
        """The memory of a piece that a worker has filled, in the process that reads."""
        array = self._array(lease.piece, lease.size)
        # A tensor's storage holds the array, whatever view of it lives longest.
        weakref.finalize(array, self._free, lease.piece).atexit = False
        return torch.from_numpy(array)

    def close(self) -> None:
        """Close all files; what was opened stays readable."""
        for file in self._files:
            os.close(file)
        self._files.clear()
        self._memory.clear()

    def _free(self, piece: int) -> None:
        self._taken[piece] = 0

    def _array(self, piece: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        memory = self._memory.get(piece)
        if memory is None or len(memory) < size:
            # All of the file, which may have grown since.
            memory = self._memory[piece] = mmap.mmap(self._files[piece], 0)
        return np.frombuffer(memory, dtype=np.uint8, count=size)


def write_batch(folder: Path, number: int, batch: Batch) -> None:
    """Write a micro-batch into a folder, by its number in the global batch."""
    tensors = {name: getattr(batch, name).clone() for name in TENSORS}
    facts = {"keys": batch.keys, "grids": batch.grids, "mean": batch.mean, "std": batch.std}
    told = {name: json.dumps(value) for name, value in facts.items()}
    write_bytes(folder / f"batch-{number:05d}.safetensors", safetensors_bytes(tensors, told))


def read_batch(folder: Path, number: int) -> Batch:
    """What :func:`write_batch` wrote; an OSError where it is not there."""
    with safe_open(folder / f"batch-{number:05d}.safetensors", "pt") as file:
        facts = {name: json.loads(text) for name, text in file.metadata().items()}
        if facts["grids"] is not None:
            facts["grids"] = tuple(map(tuple, facts["grids"]))
        facts |= {name: tuple(facts[name]) for name in ("mean", "std")}
        return Batch(**facts, **{name: file.get_tensor(name) for name in TENSORS})
