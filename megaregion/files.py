"""Files and folders that appear whole or not at all, and locks that end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

LARGE = 2**26
"""Bytes from which a file is not hashed again as long as nobody has touched it."""


def home(folder: str) -> Path:
    """tools/ or configs/: beside the package in a checkout, inside it where it was installed."""
    package = Path(__file__).parent
    return (package.parent if (package.parent / "pyproject.toml").is_file() else package) / folder


def partial_name(path: Path, shared: bool = False) -> Path:
    """The hidden name beside its own under which a file or folder is made.

    Where several processes may make it at once (``shared``) no two calls give the same name. Else all do, so
    that what a killed process left is overwritten by the next try.
    """
    # Ranks of two hosts can have the same process id, so that alone would not be a name of one's own.
    own = f".{os.getpid()}-{uuid.uuid4().hex[:8]}" if shared else ""
    return path.with_name(f".{path.name}{own}.partial")


@contextlib.contextmanager
def new_file(
    path: Path, shared: bool = False, once: bool = False, durable: bool = True
) -> Iterator[BinaryIO]:
    """Write a file in a ``with`` block: a reader sees the old one or the new one, never a part.

    If the block raises, the old file stays and no part of the new one is left.

    Args:
        path: Its name.
        shared: That of :func:`partial_name`.
        once: Refuse to replace a file, also one that appears meanwhile.
        durable: Flush file and name to the disk, so that they outlast a power cut.

    Raises:
        OSError: The disk is full or gone.
        FileExistsError: With ``once``: there is such a file.
    """
    partial = partial_name(path, shared)
    try:
        with partial.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        if once:
            os.link(partial, path)
            partial.unlink()
        else:
            partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(path.parent)


def write_bytes(path: Path, content: bytes, shared: bool = False, once: bool = False) -> None:
    """Write a small file whole, as :func:`new_file` does."""
    with new_file(path, shared, once) as stream:
        stream.write(content)


def write_text(path: Path, text: str, shared: bool = False, once: bool = False) -> None:
    """Write a small text file whole, as UTF-8, as :func:`new_file` does."""
    write_bytes(path, text.encode(), shared, once)


@contextlib.contextmanager
def new_folder(path: Path, shared: bool = False, once: bool = False) -> Iterator[Path]:
    """Fill a folder beside its place; it takes its place, and an older one's, if the block ends well.

    If the block raises, the old folder stays and no part of the new one is left; ``shared`` is that of
    :func:`partial_name`; ``once`` replaces no folder that holds anything, also one that appears meanwhile.
    """
    partial = partial_name(path, shared)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if once:
            partial.rename(path)
        else:
            replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder into another's place; a crash in between loses neither.

    Raises:
        OSError: They lie on two disks, or the disk is gone.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path | str) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or nested beyond all files of this project.
    """
    # Without a file object, for these files are small, and there may be a quarter of a million of them.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return parse_json(b"".join(iter(partial(os.read, descriptor, 2**16), b"")))
    finally:
        os.close(descriptor)


def parse_json(content: bytes | str) -> Any:
    """What JSON text says; a ValueError where it is none, or nested beyond all files of this project."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one a line, none if it is missing; a killed writer's half line is left out."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = parse_json(text)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """The same; that of a large file is kept beside it, and stands until the file is written or moved.

    The time of a file's last change is the system's own: unlike that of its last writing, no copy sets it.
    """
    state = path.stat()
    facts = [state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
    note = path.with_name(f".{path.name}.sha256")
    with contextlib.suppress(OSError, ValueError, TypeError):
        *known, sha256 = read_json(note)
        if known == facts:
            return str(sha256)
    sha256 = file_sha256(path)
    if state.st_size >= LARGE:
        with contextlib.suppress(OSError):  # A dataset may lie where nothing can be written.
            write_bytes(note, json.dumps([*facts, sha256]).encode(), shared=True)
    return sha256


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold a lock file, which is made if missing; what was killed leaves no lock behind.

    Args:
        path: The file.
        wait: Wait until it is free.
        shared: Whether others may hold it too, as long as nobody holds it alone.

    Yields:
        Whether it is held; False only where another process (or thread) holds it and ``wait`` is off.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
