"""A block: all tensors of a batch in one piece of memory, so that it passes between processes as one.

In a worker process the memory is shared: samples are written where the training process will read them, and
what travels is one file descriptor and the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

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

    @staticmethod
    def of(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Block:
        """Allocate a block, shared in a worker process, with unspecified content.

        Args:
            shapes: Type and shape of each tensor, by name.
        """
        slots, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            slots[name] = Slot(dtype, shape, end, size)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        if get_worker_info() is None:
            return Block(torch.empty(end, dtype=torch.uint8), slots)
        # As torch's own collate does; share_memory_() would copy the block once more.
        storage = torch.UntypedStorage._new_shared(end)
        return Block(torch.empty(0, dtype=torch.uint8).set_(storage), slots)

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, a view of the block."""
        slot = self.slots[name]
        return self.memory[slot.offset : slot.offset + slot.size].view(slot.dtype).view(slot.shape)

    def pin_memory(self) -> Block:
        """A copy in page-locked memory, from which a GPU copies on its own."""
        return replace(self, memory=self.memory.pin_memory())
