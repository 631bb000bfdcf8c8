"""Who owns a run folder: the start (incarnation) with the highest claim; README.md says why that is safe."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaregion.checkpoint.format import FENCE, MANIFEST, finished_folders
from megaregion.errors import Fenced, UserError
from megaregion.files import file_sha256, parse_json, read_json, write_text
from megaregion.parallel.topology import Topology, host_name

TOKEN = "MEGAREGION_FENCE"
"""Environment variable with the launcher's token, JOBID.RESTARTS under SLURM."""
LOOK_EVERY = 10.0
"""Seconds between two looks for newer claims while training goes on."""
REFUSED, UNWRITABLE = -1, -2


@dataclass(frozen=True)
class Claim:
    """One start's claim on a run."""

    number: int
    """The incarnation; the highest owns the run."""
    token: str
    """Who claims: JOBID.RESTARTS under SLURM, else host, process and time."""
    host: str
    """Host of rank 0."""
    time: float
    """Seconds since 1970, by that host's clock; for the reader's eyes only."""
    published: dict[str, str]
    """Checkpoints that were there: SHA-256 of the manifest by folder name."""


class Fence:
    """One rank's knowledge of its incarnation, and of newer ones."""

    def __init__(self, checkpoints: Path, number: int, token: str) -> None:
        self.number = number
        """This process's incarnation; 0 where nobody has claimed."""
        self.token = token
        """Token of the claim."""
        self._folder = checkpoints / FENCE
        self._next_look = time.monotonic() + LOOK_EVERY
        self._lost = False

    def check(self) -> None:
        """Look for a newer claim.

        Raises:
            Fenced: There is one.
            OSError: The folder cannot be read.
        """
        newest = max(_numbers(self._folder), default=0)
        if newest > self.number:
            self._lost = True
            raise Fenced(
                f"incarnation {self.number} ({self.token}) ends and saves nothing: incarnation {newest} has "
                f"taken over the run ({self._folder / _file(newest)})"
            )

    def lost(self) -> bool:
        """Whether a newer claim was seen; looks at most every LOOK_EVERY seconds."""
        if not self._lost and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY
            with contextlib.suppress(Fenced, OSError):
                self.check()
        return self._lost


def claim(checkpoints: Path, token: str) -> Claim:
    """Take over a run, as the next incarnation; its checkpoints folder is made if missing.

    Raises:
        Fenced: The owner is a later restart of the same SLURM job.
        OSError: The folder cannot be written.
    """
    folder = checkpoints / FENCE
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = _numbers(folder)
        owner = read_claim(folder, max(numbers)) if numbers else None
        if owner is not None and _started_late(token, owner.token):
            raise Fenced(
                f"{token} started late: {owner.token}, a later restart of the same job, owns {checkpoints}"
            )
        number = max(numbers, default=0) + 1
        made = Claim(number, token, host_name(), time.time(), _published(checkpoints))
        content = {key: value for key, value in vars(made).items() if key != "number"}
        try:
            write_text(folder / _file(number), json.dumps(content), shared=True, once=True)
        except FileExistsError:
            continue
        return made


def claim_together(checkpoints: Path, topology: Topology) -> Fence:
    """Claim the run on rank 0 and tell all ranks; a collective.

    Raises:
        Fenced: The owner is a later restart of the same SLURM job.
        UserError: The folder cannot be written.
    """
    token = os.environ.get(TOKEN) or f"{host_name()}:{os.getpid()}:{time.time():.3f}"
    number = torch.zeros((), dtype=torch.int64, device=topology.device)
    reason = f"rank 0 could not claim {checkpoints}; see its log"
    if topology.rank == 0:
        try:
            number.fill_(claim(checkpoints, token).number)
        except Fenced as error:
            number.fill_(REFUSED)
            reason = str(error)
        except OSError as error:
            number.fill_(UNWRITABLE)
            reason = f"output: {checkpoints} cannot be written: {error}; use another --output"
    dist.broadcast(number, src=0)
    if number == REFUSED:
        raise Fenced(reason)
    if number == UNWRITABLE:
        raise UserError(reason)
    return Fence(checkpoints, int(number), token)


def refusal(folder: Path) -> str | None:
    """Why no reader may use a finished checkpoint, None if it may be used, as where nobody has claimed."""
    numbers = _numbers(folder.parent / FENCE)
    if not numbers:
        return None
    try:
        manifest = (folder / MANIFEST).read_bytes()
        number = int(parse_json(manifest).get("incarnation", 0))
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        return None  # Damaged, and reported as such by whoever opens it.
    following = min((other for other in numbers if other > number), default=None)
    if following is None:
        return None
    later = read_claim(folder.parent / FENCE, following)
    # Nobody but a broken disk damages a claim, and then the checkpoints matter more than the orphans.
    if later is None or later.published.get(folder.name) == hashlib.sha256(manifest).hexdigest():
        return None
    return f"incarnation {number} published it after incarnation {following} had taken over the run"


def read_claim(folder: Path, number: int) -> Claim | None:
    """A claim by its number; None if it is missing or damaged."""
    try:
        found: dict[str, Any] = read_json(folder / _file(number))
        return Claim(number, found["token"], found["host"], found["time"], dict(found["published"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file(number: int) -> str:
    return f"{number:06d}.json"


def _numbers(folder: Path) -> list[int]:
    """Numbers of all claims."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - a missing folder must be told from other errors at once
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _published(checkpoints: Path) -> dict[str, str]:
    """Checksums of the manifests of all checkpoints that readers may use, by folder name."""
    usable = (folder for folder in finished_folders(checkpoints) if refusal(folder) is None)
    return {folder.name: file_sha256(folder / MANIFEST) for folder in usable}


def _started_late(token: str, owner: str) -> bool:
    """Whether both tokens are JOBID.RESTARTS of one job, and ours restarted less often."""
    ours, theirs = token.rpartition("."), owner.rpartition(".")
    same_job = ours[0] == theirs[0] != "" and ":" not in token
    return same_job and ours[2].isdigit() and theirs[2].isdigit() and int(ours[2]) < int(theirs[2])
