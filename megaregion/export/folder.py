"""A folder for other people's libraries: it appears complete or not at all, its weights written one by one.

model.safetensors                                                  if all fits into one file
model-00001-of-00002.safetensors ... model.safetensors.index.json  if not
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from megaregion.checkpoint.format import CHUNK, tensor_header
from megaregion.checkpoint.pretrained import INDEX
from megaregion.errors import UserError
from megaregion.files import new_folder

Item = TypeVar("Item")


def refuse_taken(out: Path) -> None:
    """Refuse a destination that holds something.

    Raises:
        UserError: It is a file, or a folder with content.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name another folder or empty this one")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder")


@contextmanager
def filled(out: Path) -> Iterator[Path]:
    """Fill a new folder that replaces nothing: what somebody has put there meanwhile stays.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with new_folder(out, shared=True, once=True) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people and libraries to read."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def grouped(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of at most this size; a larger item has a list of its own."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    yield group


def write_weights(
    folder: Path,
    planned: Sequence[tuple[str, torch.Size]],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    limit: int,
) -> int:
    """Write safetensors files tensor by tensor, so that no more than one need be in memory.

    Tensors come in the order of the planned keys and shapes, of which the files' headers are made. A file
    holds at most ``limit`` bytes; a larger tensor gets one of its own. Gives the bytes of all tensors.

    Raises:
        ValueError: The tensors are not those that were planned.
        OSError: The disk is full or gone.
    """
    files = list(grouped(planned, lambda item: item[1].numel() * dtype.itemsize, limit))
    places = {}
    for number, group in enumerate(files, start=1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        name = f"model{part}.safetensors"
        with (folder / name).open("wb") as stream:
            stream.write(tensor_header([(key, dtype, shape) for key, shape in group], {"format": "pt"}))
            for (key, shape), (given, tensor) in zip(group, islice(tensors, len(group)), strict=True):
                if (given, tensor.shape) != (key, shape):
                    raise ValueError(
                        f"{key} {list(shape)} was planned, but {given} {list(tensor.shape)} came"
                    )
                stream.writelines(_converted(tensor, dtype))
                places[key] = name
            stream.flush()
            os.fsync(stream.fileno())
    size = sum(shape.numel() for _, shape in planned) * dtype.itemsize
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return size


def _converted(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in another type, converted piece by piece."""
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, CHUNK // max(1, rows[:1].numel() * tensor.element_size()))
    for begin in range(0, len(rows), step):
        part: Any = rows[begin : begin + step].to(dtype).contiguous().reshape(-1).view(torch.uint8)
        yield memoryview(part.numpy())
