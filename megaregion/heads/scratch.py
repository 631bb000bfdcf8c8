"""Memory that one step leaves to the next, so that the processor need not map it page by page each time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Buffers by name. On a GPU, whose allocator keeps memory itself, each request is a fresh tensor."""

    def __init__(self, like: Tensor) -> None:
        """Buffers of the type and on the device of a tensor."""
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor; what was taken under the name before is overwritten."""
        size = math.prod(shape)
        if self._like.device.type != "cpu":
            return self._like.new_empty(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)  # first let go, then take: never both
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def rows(self, name: str, matrix: Tensor, chosen: Tensor) -> Tensor:
        """Copy chosen rows [n] of a matrix [K, E] into a buffer, [n, E]."""
        taken = self.take(name, (len(chosen), matrix.shape[1]))
        return torch.index_select(matrix, 0, chosen, out=taken)
