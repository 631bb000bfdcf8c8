"""One distributed checkpoint for body, moments and heads, readable on any topology and in one process.

A checkpoint is a folder of safetensors files and one ``manifest.json``. Every tensor is described whole
(shape, type) together with the pieces that ranks wrote and their place in it, so a reader asks for any
box of any tensor and never needs to know how many ranks there were. Nothing is pickled.

    checkpoints/step-00001200/manifest.json      counts, settings, hashes, tensors and their pieces
    checkpoints/step-00001200/rank-00000.safetensors ...
    checkpoints/latest                           name of the newest complete folder, renamed into place last

A folder without a manifest is one that was never finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaregion.errors import UserError
from megaregion.training.metrics import LOG

VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"


class DamagedCheckpoint(Exception):
    """A checkpoint folder that cannot be trusted; its text says which file and why."""


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


def write_pieces(folder: Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write one rank's part of a checkpoint: a safetensors file and the entries that describe it.

    Args:
        folder: The unfinished checkpoint folder, which exists.
        rank: The writing rank; names the files.
        pieces: What this rank holds; may be empty.

    Raises:
        OSError: The disk is full or gone.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    file = folder / f"rank-{rank:05d}.safetensors"
    for piece in pieces:
        if piece.tensor.numel() == 0:
            continue
        key = f"{piece.name}@{','.join(map(str, piece.offset))}"
        tensors[key] = piece.tensor.detach().to("cpu").contiguous()
        entries[key] = {
            "name": piece.name,
            "dtype": str(piece.tensor.dtype).removeprefix("torch."),
            "full_shape": list(piece.full_shape),
            "piece": {
                "file": file.name,
                "key": key,
                "offset": list(piece.offset),
                "shape": list(piece.tensor.shape),
            },
        }
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # It wraps the operating system's errors, a full disk among them.
        raise OSError(str(error)) from error
    _flush(file)
    described = {"files": {file.name: file_description(file)}, "entries": list(entries.values())}
    write_text_atomically(folder / f"rank-{rank:05d}.json", json.dumps(described))


def publish(folder: Path, final: Path, facts: dict[str, Any]) -> None:
    """Join what all ranks wrote into a manifest, then make the checkpoint visible in one rename.

    Args:
        folder: The unfinished folder; every rank has finished :func:`write_pieces`.
        final: Its name once complete; ``latest`` beside it is updated last.
        facts: Entries for the manifest besides the tensors (step, position, config, dataset).
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    parts = sorted(folder.glob("rank-*.json"))
    for part in parts:
        described = json.loads(part.read_text())
        files.update(described["files"])
        for entry in described["entries"]:
            tensor = tensors.setdefault(
                entry["name"], {"dtype": entry["dtype"], "shape": entry["full_shape"], "pieces": []}
            )
            tensor["pieces"].append(entry["piece"])
    manifest = {"version": VERSION, **facts, "files": files, "tensors": tensors}
    write_text_atomically(folder / MANIFEST, json.dumps(manifest))
    for part in parts:
        part.unlink()
    if final.exists():
        shutil.rmtree(final)
    folder.rename(final)
    write_text_atomically(final.parent / LATEST, final.name + "\n")


def retire(checkpoints: Path, keep_last: int) -> None:
    """Delete finished checkpoints beyond the newest keep_last, and every unfinished one that is older."""
    finished = [folder for folder in step_folders(checkpoints) if (folder / MANIFEST).exists()]
    for folder in finished[keep_last:]:
        shutil.rmtree(folder, ignore_errors=True)


def step_folders(checkpoints: Path) -> list[Path]:
    """Checkpoint folders, newest first, finished or not."""
    return sorted((f for f in checkpoints.glob("step-*") if f.is_dir() and f.suffix == ""), reverse=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a run folder, a checkpoints folder or one checkpoint's folder.

    Raises:
        UserError: There is no finished checkpoint there.
    """
    if (path / MANIFEST).exists():
        return path
    for checkpoints in (path / "checkpoints", path):
        latest = checkpoints / LATEST
        if latest.exists() and (checkpoints / latest.read_text().strip() / MANIFEST).exists():
            return checkpoints / latest.read_text().strip()
        for folder in step_folders(checkpoints) if checkpoints.is_dir() else ():
            if (folder / MANIFEST).exists():
                return folder
    raise UserError(
        f"{path} holds no finished checkpoint (no {MANIFEST}); give a run folder, its checkpoints folder "
        "or one step-... folder"
    )


def newest_whole(checkpoints: Path) -> CheckpointReader | None:
    """The newest checkpoint whose files match their checksums; what is skipped is logged with its reason."""
    for folder in step_folders(checkpoints) if checkpoints.is_dir() else ():
        if not (folder / MANIFEST).exists():
            LOG.warning("skipped %s: it has no %s, so it was never finished", folder, MANIFEST)
            continue
        try:
            reader = CheckpointReader(folder)
            reader.verify()
        except DamagedCheckpoint as error:
            LOG.warning("skipped %s: %s", folder, error)
            continue
        return reader
    return None


class CheckpointReader:
    """Random access to the tensors of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open a finished checkpoint.

        Raises:
            DamagedCheckpoint: The manifest or a file is missing, cut short or of another version.
        """
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read: {error}") from error
        if not isinstance(self.manifest, dict) or self.manifest.get("version") != VERSION:
            raise DamagedCheckpoint(f"{folder / MANIFEST} has no version {VERSION}")
        for name, facts in self.manifest["files"].items():
            file = folder / name
            if not file.exists() or file.stat().st_size != facts["bytes"]:
                size = file.stat().st_size if file.exists() else "no"
                raise DamagedCheckpoint(f"{file} should have {facts['bytes']} bytes and has {size}")

    @property
    def step(self) -> int:
        """Optimizer steps taken when the checkpoint was written."""
        return int(self.manifest["step"])

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.manifest["tensors"])

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._tensor(name)["shape"])

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files with their checksums.

        Args:
            names: Files to check; all if None.

        Raises:
            DamagedCheckpoint: A file's bytes are not those that were written.
        """
        for name in self.manifest["files"] if names is None else names:
            if file_description(self.folder / name) != self.manifest["files"][name]:
                raise DamagedCheckpoint(f"{self.folder / name} does not match its checksum")

    def read(
        self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Read a box of a tensor, from whatever pieces it was written in.

        Args:
            name: The tensor.
            offset: Where the box begins; the origin if None.
            shape: The box's shape; the rest of the tensor if None.

        Raises:
            DamagedCheckpoint: The tensor or a part of the box is not in the checkpoint.
        """
        described = self._tensor(name)
        full = described["shape"]
        offset = list(offset) if offset is not None else [0] * len(full)
        shape = list(shape) if shape is not None else [f - o for f, o in zip(full, offset, strict=True)]
        out = torch.empty(shape, dtype=getattr(torch, described["dtype"]))
        missing = out.numel()
        for piece in described["pieces"]:
            starts = [max(o, p) for o, p in zip(offset, piece["offset"], strict=True)]
            stops = [
                min(o + n, p + m)
                for o, n, p, m in zip(offset, shape, piece["offset"], piece["shape"], strict=True)
            ]
            if any(a >= b for a, b in zip(starts, stops, strict=True)):
                continue
            part = self._read_part(piece, starts, stops)
            out[tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, offset, strict=True))] = part
            missing -= part.numel()
        if missing:
            raise DamagedCheckpoint(f"{self.folder}: {missing} of {out.numel()} values of {name} are missing")
        return out

    def _tensor(self, name: str) -> dict[str, Any]:
        try:
            return self.manifest["tensors"][name]
        except KeyError:
            raise DamagedCheckpoint(f"{self.folder} holds no tensor {name}") from None

    def _read_part(self, piece: dict[str, Any], starts: list[int], stops: list[int]) -> Tensor:
        box = tuple(slice(a - p, b - p) for a, b, p in zip(starts, stops, piece["offset"], strict=True))
        try:
            with safe_open(self.folder / piece["file"], framework="pt") as file:
                return file.get_slice(piece["key"])[box] if box else file.get_tensor(piece["key"])
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpoint(f"{self.folder / piece['file']} cannot be read: {error}") from error


def file_description(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_text_atomically(file: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one, never a part."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
