"""Safetensors files written key by key, so that no more than one tensor need be in memory.

model.safetensors                                                  if all fits into one file
model-00001-of-00002.safetensors ... model.safetensors.index.json  if not
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megaregion.checkpoint.format import CHUNK, tensor_header
from megaregion.checkpoint.huggingface import INDEX


@dataclass(frozen=True)
class _Entry:
    key: str
    shape: tuple[int, ...]
    size: int
    """Bytes."""


class WeightFiles:
    """Tensors of known names and shapes, written in their order; use it in a ``with`` block."""

    def __init__(
        self, folder: Path, shapes: Sequence[tuple[str, Sequence[int]]], dtype: torch.dtype, limit: int
    ) -> None:
        """Plan the files.

        Args:
            folder: An existing folder without these files.
            shapes: Key and shape of every tensor, in the order in which they will come.
            dtype: Type of the written values.
            limit: Most bytes of tensors in one file; a larger tensor gets a file of its own.
        """
        self.folder = folder
        self.dtype = dtype
        width = dtype.itemsize
        entries = [_Entry(key, tuple(shape), torch.Size(shape).numel() * width) for key, shape in shapes]
        self.size = sum(entry.size for entry in entries)
        """Bytes of all tensors."""
        self._groups = _group(entries, limit)
        self._due = [(number, entry) for number, group in enumerate(self._groups) for entry in group]
        self._next = 0
        self._stream: BinaryIO | None = None

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is None:
            if self._next != len(self._due):
                raise ValueError(f"{len(self._due) - self._next} tensors were planned and not written")
            self._write_index()

    def write(self, key: str, tensor: Tensor) -> None:
        """Write the next tensor, converted piece by piece.

        Raises:
            ValueError: It is not the one that was planned.
            OSError: The disk is full or gone.
        """
        number, entry = self._due[self._next] if self._next < len(self._due) else (0, None)
        if entry is None or (entry.key, entry.shape) != (key, tuple(tensor.shape)):
            raise ValueError(f"{key} {list(tensor.shape)} is not the tensor that was planned")
        if self._next == 0 or self._due[self._next - 1][0] != number:
            self._close()
            self._open(number)
        assert self._stream is not None
        rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
        step = max(1, CHUNK // max(1, rows[:1].numel() * tensor.element_size()))
        for begin in range(0, len(rows), step):
            part: Any = rows[begin : begin + step].to(self.dtype).contiguous().reshape(-1).view(torch.uint8)
            self._stream.write(memoryview(part.numpy()))
        self._next += 1

    def _open(self, number: int) -> None:
        self._stream = (self.folder / self._name(number)).open("wb")
        described = [(entry.key, self.dtype, entry.shape) for entry in self._groups[number]]
        self._stream.write(tensor_header(described, {"format": "pt"}))

    def _close(self) -> None:
        if self._stream is not None:
            with self._stream as stream:
                stream.flush()
                os.fsync(stream.fileno())
            self._stream = None

    def _name(self, number: int) -> str:
        if len(self._groups) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self._groups):05d}.safetensors"

    def _write_index(self) -> None:
        if len(self._groups) > 1:
            index = {
                "metadata": {"total_size": self.size},
                "weight_map": {entry.key: self._name(number) for number, entry in self._due},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _group(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    groups: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size
    return groups
