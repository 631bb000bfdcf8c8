"""Writing a checkpoint: every rank its part, then one rank the manifest and the rename that shows it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from megaregion.checkpoint.format import (
    LATEST,
    MANIFEST,
    UNFINISHED,
    VERSION,
    Piece,
    copy_file,
    seal,
    write_tensors,
)
from megaregion.errors import Fenced
from megaregion.files import flush_folder, write_text


def rank_file(rank: int) -> str:
    """Name of the file that says what a rank has written; it appears when the rank is done."""
    return f"rank-{rank:05d}.json"


def write_pieces(folder: Path, rank: int, pieces: Iterable[Piece], staging: Path | None = None) -> None:
    """Write one rank's part of a checkpoint: a safetensors file and the entries that describe it.

    Args:
        folder: The unfinished checkpoint folder, which exists.
        rank: The writing rank; names the files.
        pieces: What this rank holds, in host memory; may be empty.
        staging: A folder of this rank alone on the host's own disk. The tensors are written there first and
            then copied; the copy there is left.

    Raises:
        OSError: The disk is full or gone.
    """
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    file = folder / f"rank-{rank:05d}.safetensors"
    for piece in pieces:
        if piece.tensor.numel() == 0:
            continue
        key = f"{piece.name}@{','.join(map(str, piece.offset))}"
        tensors[key] = piece.tensor
        place = {
            "file": file.name,
            "key": key,
            "offset": list(piece.offset),
            "shape": list(piece.tensor.shape),
        }
        entries.append(
            {
                "name": piece.name,
                "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                "full_shape": list(piece.full_shape),
                "piece": place,
            }
        )
    described = {"files": {file.name: _write(file, tensors, staging)}, "entries": entries}
    write_text(folder / rank_file(rank), json.dumps(described), shared=True)


def _write(file: Path, tensors: dict[str, Tensor], staging: Path | None) -> dict[str, Any]:
    if staging is None:
        return write_tensors(file, tensors)
    staging.mkdir(parents=True, exist_ok=True)
    meant = write_tensors(staging / file.name, tensors)
    copied = copy_file(staging / file.name, file)
    if copied != meant:
        raise OSError(f"{staging / file.name} does not read back as it was written")
    return meant


def publish(
    folder: Path, final: Path, facts: dict[str, Any], check: Callable[[], None] | None = None
) -> None:
    """Join what all ranks wrote into a manifest, then make the checkpoint visible in one rename.

    Args:
        folder: The unfinished folder; every rank has finished :func:`write_pieces`.
        final: Its name once complete; ``latest`` beside it is updated last.
        facts: Entries for the manifest besides the tensors (step, position, config, dataset).
        check: Called right before the rename; what it raises prevents it.

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
            tensor = tensors.setdefault(
                entry["name"], {"dtype": entry["dtype"], "shape": entry["full_shape"], "pieces": []}
            )
            tensor["pieces"].append(entry["piece"])
    manifest = {"version": VERSION, **facts, "files": files, "tensors": tensors}
    manifest["seal"] = seal(manifest)
    write_text(folder / MANIFEST, json.dumps(manifest), shared=True)
    for part in parts:
        part.unlink()
    if check is not None:
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
        theirs = int(json.loads((aside / MANIFEST).read_text()).get("incarnation", 0))
    except (OSError, ValueError, AttributeError):
        theirs = -1
    if theirs > incarnation:
        aside.rename(final)
        raise Fenced(f"incarnation {theirs} has published {final.name} and owns the run; this one ends")
    return aside
