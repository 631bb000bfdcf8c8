"""Reading a checkpoint: any box of any tensor, on any topology and in one process."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megaregion.bounds import shown
from megaregion.checkpoint.fence import refusal
from megaregion.checkpoint.format import (
    AVERAGES,
    DTYPES,
    ENCODER,
    LATEST,
    MANIFEST,
    VERSION,
    file_description,
    seal,
    step_folders,
)
from megaregion.config import RunConfig
from megaregion.errors import UserError
from megaregion.files import read_json
from megaregion.settings import check, read_settings

LOG = logging.getLogger("megaregion")


class DamagedCheckpoint(Exception):
    """A checkpoint folder that cannot be trusted; its text says which file and why."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means by a run folder, a checkpoints folder or one checkpoint's folder.

    Raises:
        UserError: There is no finished checkpoint there.
    """
    if (path / MANIFEST).exists():
        return path
    for checkpoints in (path / "checkpoints", path):
        latest = _latest(checkpoints)
        if latest is not None:
            return latest
        for folder in usable_folders(checkpoints):
            return folder
    raise UserError(
        f"{path} holds no finished checkpoint (no {MANIFEST}); give a run folder, its checkpoints folder "
        "or one step-... folder"
    )


def _latest(checkpoints: Path) -> Path | None:
    """The checkpoint that ``latest`` names, if it may be used; what is wrong with it is logged."""
    file = checkpoints / LATEST
    try:
        name = file.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        LOG.warning("%s cannot be read (%s); taking the newest finished checkpoint", file, error)
        return None
    folder = checkpoints / name
    if folder.parent != checkpoints or folder not in step_folders(checkpoints):
        LOG.warning("%s names %r, which is not there; taking the newest finished checkpoint", file, name)
        return None
    return folder if folder in usable_folders(checkpoints) else None


def usable_folders(checkpoints: Path) -> list[Path]:
    """Checkpoints that are finished and were published by the run's owner, newest first; bytes unchecked.

    What is left out is logged with its reason.
    """
    usable = []
    for folder in step_folders(checkpoints):
        if not (folder / MANIFEST).exists():
            LOG.warning("skipped %s: it has no %s, so it was never finished", folder, MANIFEST)
        elif reason := refusal(folder):
            LOG.warning("skipped %s: %s", folder, reason)
        else:
            usable.append(folder)
    return usable


def open_checkpoint(path: Path, verify: bool = True) -> CheckpointReader:
    """Open a whole checkpoint as :func:`find_checkpoint` finds it, and compare it with its checksums.

    Of many ranks that open the same files one is enough to ``verify`` them.

    Raises:
        UserError: There is none, or it is damaged.
    """
    folder = find_checkpoint(path)
    try:
        reader = CheckpointReader(folder)
        if verify:
            for name in tqdm(reader.files(), desc="verify", unit="file", disable=None):
                reader.verify([name])
    except (DamagedCheckpoint, OSError) as error:
        raise copy_again(error) from error
    return reader


def run_config(reader: CheckpointReader) -> RunConfig:
    """The settings of the run that wrote a checkpoint.

    Raises:
        UserError: The manifest holds no settings that this version knows.
    """
    try:
        return config_from_dict(reader.manifest["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{reader.folder} holds no settings of this version ({type(error).__name__}: {error}); use the "
            "version that wrote it"
        ) from error


def config_from_dict(values: object) -> RunConfig:
    """Rebuild settings from ``dataclasses.asdict`` as a checkpoint or config.yaml holds them.

    Only the model must lie within its bounds, for it will be built; the rest is how the run once was.

    Raises:
        UserError: A key that no setting has, as another version may have written, or a value of another kind.
    """
    config = read_settings(RunConfig(), values)
    check(config.model, "model")
    return config


TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""Types of tensors, by their name in a manifest."""

_ENTRIES = {"files": dict, "tensors": dict, "config": dict, "dataset": dict, "ranks": dict}


def _check_manifest(manifest: dict[str, Any]) -> None:
    """See that everything is of its type, that no piece lies elsewhere, no tensor exceeds the files.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It is not as a run writes it.
    """
    for key, kind in _ENTRIES.items():
        if not isinstance(manifest[key] if key in ("files", "tensors") else manifest.get(key, {}), kind):
            raise ValueError(f"no object as {key}")
    _sizes([manifest["step"], manifest["position"]])
    files = manifest["files"]
    for name, facts in files.items():
        if "/" in name or name in ("", ".", "..") or "\0" in name:
            raise ValueError(f"a file {shown(name)}, which lies elsewhere")
        _sizes([facts["bytes"]])
    room = sum(facts["bytes"] for facts in files.values())
    for name, described in manifest["tensors"].items():
        shape = _sizes(described["shape"])
        if described["dtype"] not in TYPES or math.prod(shape) * TYPES[described["dtype"]].itemsize > room:
            raise ValueError(f"a tensor {shown(name)} of {shown(described['dtype'])} {shown(shape)}")
        for piece in described["pieces"]:
            offset, part = _sizes(piece["offset"]), _sizes(piece["shape"])
            if piece["file"] not in files or not isinstance(piece["key"], str):
                raise ValueError(
                    f"a piece of {shown(name)} in {shown(piece['file'])}, which it does not list"
                )
            if len(offset) != len(shape) or any(
                o + n > s for o, n, s in zip(offset, part, shape, strict=True)
            ):
                raise ValueError(f"a piece of {shown(name)} that lies outside of it")


def _sizes(values: Any) -> list[int]:
    """A list of whole numbers of 0 or more."""
    if not isinstance(values, list) or not all(type(one) is int and 0 <= one < 2**62 for one in values):
        raise ValueError(f"{shown(values)} where whole numbers belong")
    return values


def copy_again(error: Exception) -> UserError:
    """The mistake that a damaged checkpoint is to whoever named it."""
    return UserError(f"{error}; give another step folder beside it, or copy the checkpoint again")


class CheckpointReader:
    """Random access to the tensors of one checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Open a finished checkpoint.

        Raises:
            DamagedCheckpoint: The manifest or a file is missing, cut short or of another version.
        """
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = read_json(folder / MANIFEST)
        except (OSError, ValueError) as error:
            raise DamagedCheckpoint(f"{folder / MANIFEST} cannot be read: {error}") from error
        if not isinstance(self.manifest, dict) or self.manifest.get("version") != VERSION:
            raise DamagedCheckpoint(f"{folder / MANIFEST} has no version {VERSION}")
        # Older manifests have no seal.
        if "seal" in self.manifest and self.manifest["seal"] != seal(self.manifest):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not match its own checksum")
        try:
            _check_manifest(self.manifest)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            lacks = f"no {error.args[0]}" if isinstance(error, KeyError) else error
            raise DamagedCheckpoint(f"{folder / MANIFEST} has {lacks}") from None
        for name, facts in self.manifest["files"].items():
            try:
                size: int | str = (folder / name).stat().st_size
            except OSError:
                size = "no"
            if size != facts["bytes"]:
                raise DamagedCheckpoint(f"{folder / name} should have {facts['bytes']} bytes and has {size}")

    @property
    def step(self) -> int:
        """Optimizer steps taken when the checkpoint was written."""
        return int(self.manifest["step"])

    def files(self) -> list[str]:
        """Names of all tensor files."""
        return list(self.manifest["files"])

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.manifest["tensors"])

    def encoder(self, name: str) -> str:
        """The tensor that stands for a weight of the network: its moving average, if the run keeps one."""
        average = AVERAGES + name
        return average if average in self.manifest["tensors"] else ENCODER + name

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return tuple(self._tensor(name)["shape"])

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compare files, all if None, with their checksums.

        Raises:
            DamagedCheckpoint: A file's bytes are not those that were written.
        """
        for name in self.manifest["files"] if names is None else names:
            try:
                found = file_description(self.folder / name)
            except OSError as error:
                raise DamagedCheckpoint(f"{self.folder / name} cannot be read: {error}") from error
            if found != self.manifest["files"][name]:
                raise DamagedCheckpoint(f"{self.folder / name} does not match its checksum")

    def read(
        self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Read a box of a tensor, from whatever pieces it was written in.

        It begins at the origin and goes to the end of the tensor where it is not said.

        Raises:
            DamagedCheckpoint: The tensor or a part of the box is not in the checkpoint.
        """
        described = self._tensor(name)
        full = described["shape"]
        offset = list(offset) if offset is not None else [0] * len(full)
        shape = list(shape) if shape is not None else [f - o for f, o in zip(full, offset, strict=True)]
        out = torch.empty(shape, dtype=TYPES[described["dtype"]])
        missing = out.numel()
        for piece in described["pieces"]:
            starts = [max(o, p) for o, p in zip(offset, piece["offset"], strict=True)]
            stops = [
                min(o + n, p + m)
                for o, n, p, m in zip(offset, shape, piece["offset"], piece["shape"], strict=True)
            ]
            if any(a >= b for a, b in zip(starts, stops, strict=True)):
                continue
            part = self._read_part(piece, out.dtype, starts, stops)
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

    def _read_part(
        self, piece: dict[str, Any], dtype: torch.dtype, starts: list[int], stops: list[int]
    ) -> Tensor:
        box = tuple(slice(a - p, b - p) for a, b, p in zip(starts, stops, piece["offset"], strict=True))
        try:
            with safe_open(self.folder / piece["file"], framework="pt") as file:
                stored = file.get_slice(piece["key"])
                found = stored.get_dtype(), stored.get_shape()
                if found != (DTYPES[dtype], piece["shape"]):
                    raise DamagedCheckpoint(
                        f"{self.folder / piece['file']} holds {piece['key']} as {found[0]} {found[1]}, the "
                        f"manifest says {DTYPES[dtype]} {piece['shape']}"
                    )
                return stored[box] if box else file.get_tensor(piece["key"])
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpoint(f"{self.folder / piece['file']} cannot be read: {error}") from error
