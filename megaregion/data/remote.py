"""A dataset that is not on this machine, as a local folder whose files come and go.

It is reached through fsspec (s3://, hf:// ...) or a shell command: `pipe:COMMAND` is plain webdataset's
convention; `{}` in the command stands for the name of a file, as in `pipe:aws s3 cp s3://bucket/shards/{} -`.

Files come when they are wanted, into a bounded folder that all processes of a host share. A file appears
under its name complete and verified, or not at all. What was opened longest ago makes room first; a process
that still reads it goes on reading it.

    CACHE/.lock                       held for a moment, while room is made
    CACHE/DATASET/shard-00000.tar     last opened when its time of change says
    CACHE/DATASET/.shard-00000.tar.lock, .partial     while it is on its way
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from megaregion.config import DataConfig
from megaregion.data.info import INFO_NAME, ShardEntry, read_info
from megaregion.data.order import SampleOrder
from megaregion.errors import UserError
from megaregion.files import locked, partial_name, write_bytes

PIPE = "pipe:"
CHUNK = 8 * 2**20
"""Bytes of one request."""

DEFAULT_CACHE = Path("~/.cache/megaregion/shards")

KEPT = (".json", ".model", "centers.npy")
"""Endings of files that are counted but never make room: small ones, and what is read by its path."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command, and no folder of this machine."""
    return path.startswith(PIPE) or "://" in path


class Mirror:
    """The local side of a remote dataset.

    Raises:
        UserError: dataset.json or a label file cannot be had or is damaged, or the cache is too small.
    """

    def __init__(self, url: str, settings: DataConfig) -> None:
        self.remote = RemoteFolder(url)
        root = Path(settings.cache).expanduser() if settings.cache else DEFAULT_CACHE.expanduser()
        content = self._read_info()
        # Named by its content: a dataset that is packed anew never mixes with what is left of the old one.
        self.folder = root / hashlib.sha256(url.encode() + content).hexdigest()[:16]
        try:
            self._cache = Cache(root, settings.cache_bytes)
            self.folder.mkdir(exist_ok=True)
            info = self.folder / INFO_NAME
            if not info.is_file() or info.read_bytes() != content:
                write_bytes(info, content, shared=True)
        except OSError as error:
            raise UserError(
                f"data.cache {root} cannot be written ({error.strerror}); name another folder"
            ) from None
        self.info = read_info(self.folder)
        self._check(settings.window_shards)
        self._fetch_label_files()

    def shard(self, shard: ShardEntry, wait: bool = True) -> bool:
        """Fetch a shard and its index; False if another process is fetching one and `wait` is off.

        Raises:
            OSError: The storage fails, or what came is not the shard.
        """
        index = self._fetch(f"{shard.name}.index.npy", index_bytes(shard.samples), None, wait)
        return self._fetch(f"{shard.name}.tar", shard.bytes, shard.sha256, wait) and index

    def fits(self, shards: list[ShardEntry]) -> bool:
        """Whether the cache can hold all of these shards at once."""
        return sum(map(_bytes, shards)) <= self._cache.limit

    def _fetch(self, name: str, size: int, sha256: str | None, wait: bool = True) -> bool:
        try:
            return self._cache.fetch(self.folder / name, self.remote.read(name), size, sha256, wait)
        except OSError as error:
            raise OSError(f"{self.remote.name(name)} cannot be had: {error}") from error

    def _read_info(self) -> bytes:
        name = self.remote.name(INFO_NAME)
        try:
            return b"".join(self.remote.read(INFO_NAME))
        except FileNotFoundError:
            way = "data.path must name a dataset that tools/curate.py has finished"
            raise UserError(f"{name} does not exist; {way}") from None
        except PermissionError as error:
            way = "give credentials as the storage's own tools take them (for s3:// AWS_PROFILE or the like)"
            raise UserError(f"{name} may not be read ({error}); {way}") from None
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error}); check data.path and the network") from None

    def _fetch_label_files(self) -> None:
        """Fetch the centers and the tokenizer that the dataset was packed with."""
        for name, sha256 in self.info.label_files.items():
            # They never go, so nobody has to note that they are used.
            if (self.folder / name).is_file():
                continue
            try:
                self._fetch(name, 0, sha256)
            except OSError as error:
                raise UserError(f"{error}; copy it to {self.remote.url}") from None

    def _check(self, window: int) -> None:
        largest = sorted(self.info.shards, key=lambda shard: shard.bytes, reverse=True)[:window]
        self.window_bytes = sum(map(_bytes, largest))
        if not self.fits(largest):
            raise UserError(
                "data.cache_bytes must hold the shards that are read at once, "
                f"{self.window_bytes:,} bytes for data.window_shards {window}, got {self._cache.limit:,}; "
                "raise it, best to twice that, or lower data.window_shards"
            )


def _bytes(shard: ShardEntry) -> int:
    return shard.bytes + index_bytes(shard.samples)


def index_bytes(samples: int) -> int:
    """Size of a shard's index file."""
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, {**layout, "shape": (samples, 4)})
    return header.tell() + 4 * 8 * samples


class RemoteFolder:
    """Reads whole files of a remote folder: a URL, or `pipe:COMMAND` with `{}` for the name of a file.

    Raises:
        UserError: The URL is of a kind that is not known, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        if not url.startswith(PIPE):
            self._filesystem(url)
        elif "{}" not in url:
            raise UserError(
                f"data.path {url} must have {{}} in place of the file's name, as in 'pipe:cat /data/{{}}'"
            )

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


class Cache:
    """A folder of files that came from elsewhere, of at most `limit` bytes, those on their way included."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def fetch(
        self, path: Path, pieces: Iterable[bytes], size: int, sha256: str | None, wait: bool = True
    ) -> bool:
        """Fetch a file unless it is there; of several processes that want it one fetches it.

        Args:
            path: Its place in a folder of the cache.
            pieces: Its content; read only if the file is not there.
            size: Bytes it must have; 0 where that is not known.
            sha256: Hash it must have, where that is known.
            wait: Whether to wait while another process fetches the file.

        Returns:
            Whether the file is there.

        Raises:
            OSError: What came is not the file, or there is no room for it.
        """
        if _touch(path):
            return True
        with locked(path.with_name(f".{path.name}.lock"), wait) as mine:
            if not mine or _touch(path):
                return mine
            partial = partial_name(path)
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
        with locked(self.folder / ".lock"):
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
            with locked(self.path.with_suffix(".lock"), wait=False) as abandoned:
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


class Prefetcher:
    """Fetches the shards of the next window while those of the window in use are read.

    It is one thread of a reading process; of several processes each fetches what no other is fetching.
    """

    def __init__(self, mirror: Mirror, order: SampleOrder) -> None:
        self._mirror, self._order = mirror, order
        self._thread: threading.Thread | None = None
        self._begun: tuple[int, ...] = ()

    def reached(self, position: int) -> None:
        """Tell where the process reads; returns at once.

        What cannot be had is not told here: the read that needs it finds out, waits and tells.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        here, following = self._order.windows(position)
        if here == self._begun:
            return
        self._begun = here
        shards = self._mirror.info.shards
        # What follows must not push out what is in use.
        wanted = [shards[number] for number in here]
        for number in following:
            if self._mirror.fits([*wanted, shards[number]]):
                wanted.append(shards[number])
        # A daemon: the process may end in the middle of a shard, whose part is nobody's then and makes room.
        self._thread = threading.Thread(target=self._fetch, args=(wanted,), name="prefetch", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until what was begun is there."""
        if self._thread is not None:
            self._thread.join()

    def _fetch(self, shards: Sequence[ShardEntry]) -> None:
        for shard in shards:
            with contextlib.suppress(OSError, UserError):
                self._mirror.shard(shard, wait=False)
