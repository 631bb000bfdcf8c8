"""A folder that is not on this machine: reached through fsspec (s3://, hf:// ...) or a shell command.

`pipe:COMMAND` is plain webdataset's convention; `{}` in the command stands for the name of a file in the
folder, as in `pipe:aws s3 cp s3://bucket/shards/{} -`.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from megaregion.errors import UserError

PIPE = "pipe:"
CHUNK = 8 * 2**20
"""Bytes of one request."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command, and no folder of this machine."""
    return path.startswith(PIPE) or "://" in path


class RemoteFolder:
    """Reads whole files of a remote folder.

    Args:
        url: The folder, or `pipe:COMMAND` with `{}` for the name of a file.

    Raises:
        UserError: The URL is of a kind that is not known, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if url.startswith(PIPE):
            if "{}" not in url:
                raise UserError(
                    f"data.path {url} must have {{}} in place of the file's name, as in 'pipe:cat /data/{{}}'"
                )
        else:
            self._filesystem(url)

    def name(self, file: str) -> str:
        """How a message names one of the files."""
        if self.url.startswith(PIPE):
            return self.url.replace("{}", shlex.quote(file))
        return f"{self.url.rstrip('/')}/{file}"

    def read(self, file: str) -> Iterator[bytes]:
        """Read a file from its beginning to its end, in pieces.

        Raises:
            FileNotFoundError: There is no such file.
            PermissionError: Credentials are missing or do not suffice.
            OSError: The storage or the command fails.
        """
        if self.url.startswith(PIPE):
            yield from self._run(file)
            return
        try:
            filesystem, path = self._filesystem(self.name(file))
            with filesystem.open(path, "rb", block_size=CHUNK) as stream:
                yield from _pieces(stream)
        except (OSError, UserError):
            raise
        # Every storage has its own family of errors, and few of them are OSErrors.
        except Exception as error:
            kind = PermissionError if "credential" in f"{type(error).__name__} {error}".lower() else OSError
            raise kind(f"{type(error).__name__}: {_line(error)}") from error

    def _filesystem(self, url: str) -> tuple[Any, str]:
        # Made where it is used: its threads and connections do not survive a fork. fsspec keeps it for later.
        import fsspec

        try:
            return fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise UserError(
                f"data.path {self.url} needs a package that is not installed: {_line(error)}"
            ) from None
        except ValueError as error:
            raise UserError(
                f"data.path {self.url} cannot be used ({_line(error)}); name a folder, s3://BUCKET/FOLDER, "
                "hf://datasets/OWNER/NAME, another of fsspec's protocols, or pipe:COMMAND with {}"
            ) from None

    def _run(self, file: str) -> Iterator[bytes]:
        command = self.name(file).removeprefix(PIPE)
        # Complaints go to a file: a pipe that nobody empties would stop a talkative command.
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
            )
            with process:
                try:
                    yield from _pieces(cast(BinaryIO, process.stdout))
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                complaints.seek(0)
                said = _line(complaints.read(4_000).decode(errors="replace"))
                raise OSError(
                    f"the command ended with exit code {process.returncode}: {said or 'no message'}"
                )


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(CHUNK):
        yield piece


def _line(text: object) -> str:
    """The last line of a message, where programs and libraries put what matters."""
    return (str(text).strip().splitlines() or [""])[-1]
