"""A block: all tensors of a batch in one piece of memory, so that it passes between processes as one.

In a worker process the memory is shared: samples are written where the training process will read them, and
what travels is the number of a piece and the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from megaregion.data.pool import Lease, Pool

ALIGNMENT = 64
"""Bytes of a cache line; every tensor begins on one."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in the block."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte."""
    size: int
    """Bytes."""


@dataclass(frozen=True, eq=False)
class Block:
    """Memory and the tensors that lie in it."""

    memory: Tensor
    """uint8 [bytes]."""
    slots: Mapping[str, Slot]
    lease: Lease | None = None
    """How another process opens the memory, if it is a pool's and this process took it."""

    @staticmethod
    def of(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], pool: Pool | None = None) -> Block:
        """Allocate a block with unspecified content.

        Args:
            shapes: Type and shape of each tensor, by name.
            pool: Where a worker process takes memory; when all of it is in use the block gets its own,
                which is copied through the pipe when it is sent.
        """
        slots, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            slots[name] = Slot(dtype, shape, end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        worker = get_worker_info()
        if worker is not None and pool is not None and (taken := pool.take(worker.id, end)) is not None:
            lease, memory = taken
            return Block(memory, slots, lease)
        return Block(torch.empty(end, dtype=torch.uint8), slots)

    def __reduce__(self) -> tuple[Callable[..., Block], tuple[Any, ...]]:
        if self.lease is None:
            # A tensor would be copied to /dev/shm; where that is full, the queue's thread only complains on
            # stderr, and the reader would wait for ever.
            return _copied, (self.memory.numpy(), self.slots)
        return _opened, (self.lease, self.slots)

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, a view of the block."""
        slot = self.slots[name]
        return self.memory[slot.offset : slot.offset + slot.size].view(slot.dtype).view(slot.shape)

    def pin_memory(self) -> Block:
        """A copy in page-locked memory, from which a GPU copies on its own."""
        return Block(self.memory.pin_memory(), self.slots)


def _copied(memory: NDArray[np.uint8], slots: Mapping[str, Slot]) -> Block:
    return Block(torch.from_numpy(memory), slots)


def _opened(lease: Lease, slots: Mapping[str, Slot]) -> Block:
    return Block(lease.open(), slots)
