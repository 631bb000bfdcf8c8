"""Writing a safetensors file as a stream, with its checksum in the same pass.

The library's own writer holds a second copy of all bytes and the interpreter's lock while it makes it, and
the checksum would need to read the file again. Here the bytes go from the tensors to the disk in chunks, and
while a chunk is hashed or written the training thread may run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHUNK = 8 * 2**20
"""Bytes written at once."""

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the types in the format, widest first: in this order every tensor lies aligned."""


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors that lie in host memory, and flush them to the disk.

    Args:
        file: The new file; one that exists is replaced.
        tensors: Tensors by name.

    Returns:
        The file's description as :func:`file_description` gives it, of the bytes that were meant.

    Raises:
        OSError: The disk is full or gone; a part of the file may be left.
    """
    order = sorted(tensors, key=lambda name: (list(DTYPES).index(tensors[name].dtype), name))
    head: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        head[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    with file.open("wb", buffering=0) as stream:
        for chunk in _chunks([len(text).to_bytes(8, "little") + text], [tensors[name] for name in order]):
            digest.update(chunk)
            written += _write_all(stream, chunk)
        os.fsync(stream.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file, flush it to the disk, and describe the bytes that were read.

    Raises:
        OSError: A disk is full or gone.
    """
    digest = hashlib.sha256()
    written = 0
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            written += _write_all(writing, memoryview(chunk))
        os.fsync(writing.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}


def file_description(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _chunks(head: list[bytes], tensors: list[Tensor]) -> Iterator[memoryview]:
    yield from (memoryview(part) for part in head)
    for tensor in tensors:
        flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        whole = memoryview(flat)
        for begin in range(0, len(whole), CHUNK):
            yield whole[begin : begin + CHUNK]


def _write_all(stream: Any, chunk: memoryview) -> int:
    done = 0
    while done < len(chunk):
        done += stream.write(chunk[done:])
    return done
