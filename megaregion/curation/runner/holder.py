"""Who works on what right now: locks that end with their process, and a sign of life for others.

A run holds its folder alone, shares of a run hold it together; each holds the pieces that it works on:

    OUT/.lock                          locked while a run or a share works in the folder; names it
    OUT/stages/STAGE/.locks            byte i is locked while piece i is worked on
    OUT/stages/STAGE/.running/00003    who works on it, and how far; rewritten every few seconds
    OUT/stages/STAGE/.failed/00003     why the last try ended, until the next one

None of them is part of the outcome.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from megaregion.errors import UserError
from megaregion.files import locked, new_file, read_json

LOG = logging.getLogger("megaregion.curation")

RUNNING, FAILED = ".running", ".failed"

BEAT = 5.0
"""Seconds between signs of life."""
PATIENCE = 120.0
"""Seconds that a piece in use is waited for: a network file system holds a dead node's locks for a while."""
SILENCE = 60.0
"""Seconds without one after which a piece's worker counts as dead."""


@dataclass
class Holder:
    """A process's word that it works on a piece."""

    host: str
    process: int
    began: float
    """Seconds since 1970."""
    images: int = 0
    """Images that are done."""

    @property
    def name(self) -> str:
        """The process, for messages."""
        return f"process {self.process} on {self.host}"


@contextmanager
def folder_held(out: Path, shared: bool = False) -> Iterator[None]:
    """Hold a run's folder, made if missing, for this process; shares of a run may hold it together.

    Raises:
        UserError: Another run holds it, or it cannot be written.
    """
    path = out / ".lock"
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            free = stack.enter_context(locked(path, wait=False, shared=shared))
        except OSError as error:
            raise UserError(
                f"--out {out} cannot be written ({error.strerror}); choose another folder"
            ) from None
        if not free:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise UserError(
                f"--out {out} is in use by {holder}; wait until it has ended or choose another folder"
            )
        path.write_text("a share of a run, " * shared + _this_process().name)
        yield


@contextmanager
def held(folder: Path, number: int, tick: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Hold a piece of a stage's folder for this process, and leave a note if its work fails.

    Yields:
        What must be called for every image; it calls ``tick``.

    Raises:
        UserError: Another process works on it.
    """
    holder = _this_process()
    for name in (RUNNING, FAILED):
        (folder / name).mkdir(parents=True, exist_ok=True)
    running, failed = (folder / name / f"{number:05d}" for name in (RUNNING, FAILED))
    with (folder / ".locks").open("ab") as locks:
        _lock(locks, folder, number)
        failed.unlink(missing_ok=True)

        def count() -> None:
            holder.images += 1
            tick()

        with _beating(running, holder):
            try:
                yield count
            except BaseException as error:
                _note(failed, f"{error.__class__.__name__}: {error} ({holder.name})")
                raise


def read_holder(folder: Path, number: int) -> Holder | str | None:
    """Who works on a piece of a stage; a text if its worker is dead, and None if there never was one."""
    path = folder / RUNNING / f"{number:05d}"
    try:
        holder = Holder(**read_json(path))
        silence = time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    here = holder.host == socket.gethostname()
    if silence > SILENCE or (here and not Path(f"/proc/{holder.process}").exists()):
        return f"{holder.name} was killed after {holder.images} images"
    return holder


def last_failure(folder: Path, number: int) -> str:
    """Why the last try at a piece ended; empty if it did not fail."""
    try:
        return (folder / FAILED / f"{number:05d}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), time.time())


def _lock(locks: BinaryIO, folder: Path, number: int) -> None:
    """Lock a piece; the worker of a run that was killed lets go of it within an image."""
    began = time.monotonic()
    told = False
    while True:
        try:
            return fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            waited = time.monotonic() - began
        holder = read_holder(folder, number)
        name = holder.name if isinstance(holder, Holder) else "another process"
        state = f"piece {number} of stage {folder.name} is in use by {name}"
        if waited > PATIENCE:
            raise UserError(f"{state}; wait until it has ended")
        if waited > 2 and not told:
            LOG.warning("%s; waiting for it", state)
            told = True
        time.sleep(0.1)


@contextmanager
def _beating(path: Path, holder: Holder) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while True:
            _note(path, json.dumps(asdict(holder)))
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _note(path: Path, text: str) -> None:
    """Write a small file whole; a full disk must not end the work for it."""
    with suppress(OSError), new_file(path, shared=True, durable=False) as file:
        file.write(text.encode(errors="replace"))
