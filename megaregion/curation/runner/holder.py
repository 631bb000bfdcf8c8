"""Who works on what right now: locks that end with their process, and a sign of life for others.

    OUT/.lock                        held by a run alone, or by shares of one together; names it
    OUT/stages/STAGE/.locks          byte i is locked while piece i is worked on
    OUT/stages/STAGE/.notes/00003    who works on it and how far, rewritten every few seconds; why it failed

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

BEAT = 5.0
"""Seconds between signs of life."""
PATIENCE = 120.0
"""Seconds that a piece in use is waited for: a network file system holds a dead node's locks for a while."""
SILENCE = 60.0
"""Seconds without one after which a piece's worker counts as dead."""


@dataclass
class Note:
    """What a process says of a piece: that it works on it, or how its last try ended without an outcome."""

    host: str
    process: int
    began: float
    """Seconds since 1970."""
    images: int = 0
    """Images that are done."""
    failure: str = ""

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
    note, path = _this_process(), _path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (folder / ".locks").open("ab") as locks:
        _lock(locks, folder, number)

        def count() -> None:
            note.images += 1
            tick()

        with _beating(path, note):
            try:
                yield count
            except BaseException as error:
                note.failure = f"{error.__class__.__name__}: {error} ({note.name})"
                raise


def read_note(folder: Path, number: int) -> Note | None:
    """What is said of a piece of a stage, None if nothing; that its worker was killed is a failure."""
    path = _path(folder, number)
    try:
        note = Note(**read_json(path))
        silence = time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    here = note.host == socket.gethostname()
    if not note.failure and (silence > SILENCE or (here and not Path(f"/proc/{note.process}").exists())):
        note.failure = f"{note.name} was killed after {note.images} images"
    return note


def _path(folder: Path, number: int) -> Path:
    return folder / ".notes" / f"{number:05d}"


def _this_process() -> Note:
    return Note(socket.gethostname(), os.getpid(), time.time())


def _lock(locks: BinaryIO, folder: Path, number: int) -> None:
    """Lock a piece; the worker of a run that was killed lets go of it within an image."""
    began = time.monotonic()
    told = False
    while True:
        try:
            return fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            waited = time.monotonic() - began
        note = read_note(folder, number)
        name = note.name if note and not note.failure else "another process"
        state = f"piece {number} of stage {folder.name} is in use by {name}"
        if waited > PATIENCE:
            raise UserError(f"{state}; wait until it has ended")
        if waited > 2 and not told:
            LOG.warning("%s; waiting for it", state)
            told = True
        time.sleep(0.1)


@contextmanager
def _beating(path: Path, note: Note) -> Iterator[None]:
    """Write the note every few seconds, and at the end where there is a failure to tell."""
    ended = threading.Event()

    def write() -> None:
        # A full disk must not end the work for a note.
        with suppress(OSError), new_file(path, shared=True, durable=False) as file:
            file.write(json.dumps(asdict(note)).encode())

    def beat() -> None:
        while not ended.wait(BEAT):
            write()

    write()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if note.failure:
            write()
        else:
            path.unlink(missing_ok=True)
