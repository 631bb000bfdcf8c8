"""Memory in which worker processes write batches and the training process reads them, used again and again.

Memory that is fresh for each batch costs a page fault for every 4 KB on both sides, and a file that has to
be passed along. Here all files are opened before the workers are forked, so that a batch travels as the
number of its piece; they lie in no file system, so that a small /dev/shm is no limit.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

GROWTH = 1 << 20
"""Bytes by which a piece grows at least; packed batches differ in length."""

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
    """Pieces of shared memory, the same number for each worker.

    A piece is marked as taken by its worker and as free by the process that reads; since each of the two
    waits for the other's mark, no lock is needed.

    Args:
        workers: Processes that will be forked from this one.
        pieces: Pieces of each.
    """

    def __init__(self, workers: int, pieces: int) -> None:
        self.number = next(_NUMBERS)
        self._pieces = pieces
        self._files = [os.memfd_create("batch") for _ in range(workers * pieces)]
        self._taken = mmap.mmap(-1, workers * pieces)
        self._memory: dict[int, mmap.mmap] = {}
        _POOLS[self.number] = self

    def take(self, worker: int, size: int) -> tuple[Lease, Tensor] | None:
        """Take a free piece, in the process of a worker.

        Args:
            worker: Number of this process among the workers.
            size: Bytes wanted.

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
