"""What a checkpoint is on disk: names, pieces of tensors, and safetensors files written as a stream.

    checkpoints/step-00001200/manifest.json      counts, settings, hashes, tensors and their pieces
    checkpoints/step-00001200/rank-00000.safetensors ...
    checkpoints/step-00001300.unfinished-000002/ being written by incarnation 2, or never finished
    checkpoints/latest                           name of the newest complete folder, renamed into place last
    checkpoints/fence/000002.json                claim of incarnation 2, see fence.py

Every tensor is described whole (shape, type) together with the pieces that ranks wrote and their place in it,
so a reader asks for any box of any tensor and never needs to know how many ranks there were. Nothing is
pickled. A folder without a manifest is one that was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 1
"""Of the manifest."""
MANIFEST = "manifest.json"
LATEST = "latest"
DONE = "DONE"
"""Lies in the run's folder once the last step is taken: jobs that were chained to it leave at once."""
FENCE = "fence"
UNFINISHED = ".unfinished"
"""Begins the suffix of a folder that is being written."""
ENCODER = "body.weight."
"""Begins the names of the trained network's weights."""
BODY = ENCODER + "vit."
"""Begins the names of its transformer's weights."""

CHUNK = 8 * 2**20
"""Bytes written at once."""

DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16",
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of the types in safetensors, widest first: in this order every tensor lies aligned."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that one rank holds."""

    name: str
    """Name of the full tensor."""
    full_shape: tuple[int, ...]
    """Shape of the full tensor."""
    offset: tuple[int, ...]
    """Where the part begins in the full tensor."""
    tensor: Tensor
    """The part."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after this many steps."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Steps behind the checkpoint of a folder, finished or not."""
    return int(folder.name.split(".")[0].removeprefix("step-"))


def unfinished_folder(checkpoints: Path, step: int, incarnation: int) -> Path:
    """Folder that one incarnation writes a checkpoint into; never that of another incarnation."""
    return checkpoints / f"step-{step:08d}{UNFINISHED}-{incarnation:06d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, finished or not; none if the folder is missing."""
    return sorted((f for f in checkpoints.glob("step-*") if f.is_dir() and f.suffix == ""), reverse=True)


def finished_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders with a manifest, newest first."""
    return [folder for folder in step_folders(checkpoints) if (folder / MANIFEST).exists()]


def seal(manifest: dict[str, Any]) -> str:
    """Checksum of a manifest's content, without the seal itself."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensor_header(
    described: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file begins with; the tensors' bytes follow in the same order.

    Args:
        described: Name, type and shape of every tensor.
        metadata: Strings to go with them.
    """
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in described:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        head[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, and flush it to the disk.

    The library's own writer holds a second copy of all bytes and the interpreter's lock while it makes it,
    and the checksum would need to read the file again. Here the bytes go from the tensors to the disk in
    chunks, and while a chunk is hashed or written the training thread may run.

    Args:
        file: The new file; one that exists is replaced.
        tensors: Tensors by name, in host memory.

    Returns:
        The file's description as :func:`file_description` gives it, of the bytes that were meant.

    Raises:
        OSError: The disk is full or gone; a part of the file may be left.
    """
    widest = list(DTYPES)
    order = sorted(tensors.items(), key=lambda item: (widest.index(item[1].dtype), item[0]))
    header = tensor_header([(name, tensor.dtype, tensor.shape) for name, tensor in order])
    return _write_chunks(file, _chunks(header, [tensor for _, tensor in order]))


def copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file, flush it to the disk, and describe the bytes that were read.

    Raises:
        OSError: A disk is full or gone.
    """
    return _write_chunks(target, _chunks_of_file(source))


def file_description(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _chunks(header: bytes, tensors: Sequence[Tensor]) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        whole = memoryview(flat)
        for begin in range(0, len(whole), CHUNK):
            yield whole[begin : begin + CHUNK]


def _chunks_of_file(file: Path) -> Iterator[memoryview]:
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            yield memoryview(chunk)


def _write_chunks(file: Path, chunks: Iterator[memoryview]) -> dict[str, Any]:
    digest, written = hashlib.sha256(), 0
    with file.open("wb", buffering=0) as stream:
        for chunk in chunks:
            digest.update(chunk)
            # An unbuffered write may take a part only.
            done = 0
            while done < len(chunk):
                done += stream.write(chunk[done:])
            written += done
        os.fsync(stream.fileno())
    return {"bytes": written, "sha256": digest.hexdigest()}
