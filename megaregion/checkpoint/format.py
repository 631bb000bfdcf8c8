"""What a checkpoint is on disk, and how it gets there; README.md draws the folder.

Every rank writes its pieces of the full tensors, then one rank joins their descriptions in a manifest and
shows the folder by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaregion.errors import Fenced
from megaregion.files import file_sha256, flush_folder, read_json, write_text

VERSION = 1
"""Of the manifest."""
MANIFEST = "manifest.json"
"""A folder without one was never finished."""
LATEST = "latest"
FENCE = "fence"
UNFINISHED = ".unfinished"
"""Begins the suffix of a folder that is being written."""
ENCODER = "body.weight."
"""Begins the names of the trained network's weights."""
AVERAGES = "body.ema."
"""Begins the names of their moving averages, where the run keeps them."""
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
    """What a safetensors file of tensors of these names, types and shapes begins with; their bytes follow."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in described:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        head[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file of tensors in host memory, and flush it to the disk.

    The library's own writer holds a second copy of all bytes and the interpreter's lock while it makes it,
    and the checksum would need to read the file again. Here the bytes go from the tensors to the disk in
    chunks, and while a chunk is hashed or written the training thread may run.

    Returns:
        The file's description as :func:`file_description` gives it, of the bytes that were meant.

    Raises:
        OSError: The disk is full or gone; a part of the file may be left.
    """
    widest = list(DTYPES)
    order = sorted(tensors.items(), key=lambda item: (widest.index(item[1].dtype), item[0]))
    header = tensor_header([(name, tensor.dtype, tensor.shape) for name, tensor in order])
    return _write_chunks(file, _chunks(header, [tensor for _, tensor in order]))


def file_description(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


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


def rank_file(rank: int) -> str:
    """Name of the file that says what a rank has written; it appears when the rank is done."""
    return f"rank-{rank:05d}.json"


def write_pieces(folder: Path, rank: int, pieces: Iterable[Piece], staging: Path | None = None) -> None:
    """Write one rank's part of a checkpoint: a safetensors file and the entries that describe it.

    With ``staging``, a folder of this rank alone on the host's own disk, the tensors are written there first
    and then copied; the copy there is left.

    Raises:
        OSError: The disk is full or gone.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    file = folder / f"rank-{rank:05d}.safetensors"
    for piece in pieces:
        if piece.tensor.numel() == 0:
            continue
        key, offset = f"{piece.name}@{','.join(map(str, piece.offset))}", list(piece.offset)
        tensors[key] = piece.tensor
        entries.append(
            {
                "name": piece.name,
                "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                "full_shape": list(piece.full_shape),
                "piece": {"file": file.name, "key": key, "offset": offset, "shape": list(piece.tensor.shape)},
            }
        )
    if staging is None:
        meant = write_tensors(file, tensors)
    else:
        staging.mkdir(parents=True, exist_ok=True)
        staged = staging / file.name
        meant = write_tensors(staged, tensors)
        if _write_chunks(file, _chunks_of_file(staged)) != meant:
            raise OSError(f"{staged} does not read back as it was written")
    described = {"files": {file.name: meant}, "entries": entries}
    write_text(folder / rank_file(rank), json.dumps(described), shared=True)


def publish(
    folder: Path, final: Path, facts: dict[str, Any], check: Callable[[], None] = lambda: None
) -> None:
    """Join what all ranks wrote into a manifest, then make the checkpoint visible in one rename.

    ``facts`` are the manifest's entries besides the tensors (step, position, config, dataset). ``check`` is
    called right before the rename; what it raises prevents it. ``latest`` beside the folder is updated last.

    Raises:
        OSError: The disk is full or gone.
        Fenced: A newer incarnation has published the same step.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    parts = sorted(folder.glob("rank-*.json"))
    for part in parts:
        described = json.loads(part.read_text())
        files.update(described["files"])
        for entry in described["entries"]:
            whole = {"dtype": entry["dtype"], "shape": entry["full_shape"], "pieces": []}
            tensors.setdefault(entry["name"], whole)["pieces"].append(entry["piece"])
    manifest = {"version": VERSION, **facts, "files": files, "tensors": tensors}
    manifest["seal"] = seal(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest), shared=True)
    for part in parts:
        part.unlink()
    check()
    replaced = _move_aside(final, facts.get("incarnation", 0))
    try:
        folder.rename(final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    flush_folder(final.parent)
    write_text(final.parent / LATEST, final.name + "\n", shared=True)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _move_aside(final: Path, incarnation: int) -> Path | None:
    """Rename an older checkpoint of the same step, from before a crash or a roll-back; returns its new name.

    A rename takes exactly one folder, so what is replaced is what was judged, even if another incarnation
    publishes at the same moment.
    """
    if not final.exists():
        return None
    aside = final.with_name(f"{final.name}{UNFINISHED}-replaced-{uuid.uuid4().hex[:8]}")
    final.rename(aside)
    try:
        theirs = int(read_json(aside / MANIFEST).get("incarnation", 0))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        theirs = -1
    if theirs > incarnation:
        aside.rename(final)
        raise Fenced(f"incarnation {theirs} has published {final.name} and owns the run; this one ends")
    return aside
