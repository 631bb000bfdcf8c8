"""A bounded folder of files that came from elsewhere, shared by all processes of a host.

A file appears under its name complete and verified, or not at all. What was opened longest ago makes room
first; a process that still reads it goes on reading it.

    CACHE/.lock                       held for a moment, while room is made
    CACHE/DATASET/shard-00000.tar     last opened when its time of change says
    CACHE/DATASET/.shard-00000.tar.lock, .partial     while it is on its way
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

KEPT = (".json", ".model", "centers.npy")
"""Endings of files that are counted but never make room: small ones, and what is read by its path."""


class Cache:
    """The folder and its bound.

    Args:
        folder: The folder; made when missing.
        limit: Most bytes of all files, those on their way included.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(
        self, path: Path, pieces: Iterable[bytes], size: int, sha256: str | None, wait: bool = True
    ) -> bool:
        """Bring a file unless it is there; of several processes that want it one brings it.

        Args:
            path: Its place in a folder of the cache.
            pieces: Its content; read only if the file is not there.
            size: Bytes it must have; 0 where that is not known.
            sha256: Hash it must have, where that is known.
            wait: Whether to wait while another process brings the file.

        Returns:
            Whether the file is there.

        Raises:
            OSError: What came is not the file, or there is no room for it.
        """
        if _touch(path):
            return True
        with _locked(path.with_name(f".{path.name}.lock"), wait) as mine:
            if not mine or _touch(path):
                return mine
            partial = path.with_name(f".{path.name}.partial")
            try:
                self._make_room(partial, size)
                with partial.open("r+b") as file:
                    _write(file, pieces, size, sha256)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _make_room(self, partial: Path, size: int) -> None:
        """Reserve a file's bytes, so that files that come at the same time do not pass the bound together."""
        partial.unlink(missing_ok=True)
        with _locked(self.folder / ".lock"):
            files = list(_files(self.folder))
            used = sum(file.size for file in files)
            for file in sorted(files, key=lambda file: file.used):
                if used + size <= self.limit:
                    break
                if file.can_go():
                    file.path.unlink(missing_ok=True)
                    used -= file.size
            if used + size > self.limit:
                raise OSError(
                    f"{self.folder} has no room for {size:,} bytes more: {used:,} of data.cache_bytes "
                    f"{self.limit:,} are taken by files that are on their way or cannot go"
                )
            with partial.open("wb") as reserved:
                reserved.truncate(size)


@dataclass(frozen=True)
class _Held:
    path: Path
    size: int
    used: float
    """Time of last use."""

    def can_go(self) -> bool:
        """Whether nobody needs the file under its name."""
        if self.path.name.endswith(".partial"):
            # One that nobody writes was left by a process that was killed.
            with _locked(self.path.with_suffix(".lock"), wait=False) as abandoned:
                return abandoned
        return not self.path.name.endswith(KEPT)


def _files(folder: Path) -> Iterator[_Held]:
    for path in folder.glob("*/*"):
        # It may go while it is looked at.
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            if not path.name.endswith(".lock"):
                yield _Held(path, state.st_size, state.st_mtime)


def _touch(path: Path) -> bool:
    """Note that a file is used; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(file: BinaryIO, pieces: Iterable[bytes], size: int, sha256: str | None) -> None:
    total, found = 0, hashlib.sha256()
    for piece in pieces:
        total += len(piece)
        if size and total > size:
            raise OSError(f"more than the {size:,} bytes that belong to it arrived")
        found.update(piece)
        file.write(piece)
    if size and total != size:
        raise OSError(f"{total:,} bytes arrived, {size:,} belong to it")
    if sha256 is not None and found.hexdigest() != sha256:
        raise OSError(
            f"what arrived is another file (sha256 {found.hexdigest()[:12]}, expected {sha256[:12]})"
        )


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; without waiting, give False if another process (or thread) holds it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
