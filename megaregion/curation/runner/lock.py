"""One run at a time in a folder, or many shares of one; what was killed leaves no lock behind."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaregion.errors import UserError


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold a folder for this process.

    Args:
        folder: The run's folder.
        shared: Whether other processes may hold it like this one; they lock what they work on themselves.

    Raises:
        UserError: Another run holds it, or it cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not truncated by opening: the other run's name is still needed for the message.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
    except OSError as error:
        raise UserError(
            f"--out {folder} cannot be written ({error.strerror}); choose another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "another process"
            raise UserError(
                f"--out {folder} is in use by {holder}; wait until it has ended or choose another folder"
            ) from None
        file.seek(0)
        file.truncate()
        share = "a share of a run, " * shared
        file.write(f"{share}process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
