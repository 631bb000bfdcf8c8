"""A folder for other people's libraries: it appears complete or not at all, its weights written one by one.

model.safetensors                                                  if all fits into one file
model-00001-of-00002.safetensors ... model.safetensors.index.json  if not
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megaregion.checkpoint.format import CHUNK, tensor_header
from megaregion.checkpoint.pretrained import INDEX
from megaregion.errors import UserError
from megaregion.files import partial_name

Planned = Sequence[tuple[str, torch.Size]]
"""Key and shape of every tensor that will be written, in this order."""


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
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside its destination, renamed into place if all went well, deleted if not.

    Raises:
        UserError: It cannot be written.
    """
    refuse_taken(out)
    partial = partial_name(out, shared=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        # A rename and no replacement: what somebody has put there meanwhile stays.
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for people and libraries to read."""
    file.write_text(json.dumps(content, indent=2) + "\n")


def write_weights(
    folder: Path, planned: Planned, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, limit: int
) -> int:
    """Write safetensors files tensor by tensor, so that no more than one need be in memory.

    Args:
        folder: An existing folder without these files.
        planned: Keys and shapes, for the files' headers.
        tensors: The tensors, in the order that was planned.
        dtype: Type of the written values.
        limit: Most bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: The tensors are not those that were planned.
        OSError: The disk is full or gone.
    """
    groups = _group(planned, limit // dtype.itemsize)
    rest, places = iter(tensors), {}
    for number, group in enumerate(groups, start=1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        name = f"model{part}.safetensors"
        with (folder / name).open("wb") as stream:
            stream.write(tensor_header([(key, dtype, shape) for key, shape in group], {"format": "pt"}))
            for key, shape in group:
                given, tensor = next(rest, ("nothing", torch.empty(0)))
                if (given, tensor.shape) != (key, shape):
                    raise ValueError(
                        f"{key} {list(shape)} was planned, but {given} {list(tensor.shape)} came"
                    )
                stream.writelines(_converted(tensor, dtype))
                places[key] = name
            stream.flush()
            os.fsync(stream.fileno())
    if next(rest, None) is not None:
        raise ValueError("more tensors came than were planned")
    size = sum(shape.numel() for _, shape in planned) * dtype.itemsize
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return size


def _converted(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in another type, converted piece by piece."""
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    step = max(1, CHUNK // max(1, rows[:1].numel() * tensor.element_size()))
    for begin in range(0, len(rows), step):
        part: Any = rows[begin : begin + step].to(dtype).contiguous().reshape(-1).view(torch.uint8)
        yield memoryview(part.numpy())


def _group(planned: Planned, limit: int) -> list[list[tuple[str, torch.Size]]]:
    """Cut into files of at most so many values."""
    groups: list[list[tuple[str, torch.Size]]] = [[]]
    size = 0
    for key, shape in planned:
        if groups[-1] and size + shape.numel() > limit:
            groups.append([])
            size = 0
        groups[-1].append((key, shape))
        size += shape.numel()
    return groups
