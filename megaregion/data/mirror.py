"""A remote dataset as a local folder, whose files come when they are wanted and go when others need room."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np

from megaregion.config import DataConfig
from megaregion.data.cache import Cache
from megaregion.data.info import (
    CENTERS_NAME,
    INFO_NAME,
    TOKENIZER_NAME,
    ShardEntry,
    read_info,
    replace_file,
)
from megaregion.data.remote import RemoteFolder
from megaregion.errors import UserError

DEFAULT_CACHE = Path("~/.cache/megaregion/shards")


class Mirror:
    """The local side of a remote dataset.

    Args:
        url: The dataset's folder, or `pipe:COMMAND`.
        settings: Folder and size of the cache, and shards of a window.

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
            replace_file(self.folder / INFO_NAME, content)
        except OSError as error:
            raise UserError(
                f"data.cache {root} cannot be written ({error.strerror}); name another folder"
            ) from None
        self.info = read_info(self.folder)
        self._check(settings.window_shards)
        self._bring_label_files()

    def shard(self, shard: ShardEntry, wait: bool = True) -> bool:
        """Bring a shard and its index.

        Args:
            shard: The shard.
            wait: Whether to wait while another process brings it.

        Returns:
            Whether both are there.

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

    def _bring_label_files(self) -> None:
        """Bring the centers and the tokenizer that the dataset was packed with."""
        for name, sha256 in (
            (CENTERS_NAME, self.info.centers_sha256),
            (TOKENIZER_NAME, self.info.tokenizer_sha256),
        ):
            if sha256 is not None:
                try:
                    self._fetch(name, 0, sha256)
                except OSError as error:
                    raise UserError(f"{error}; copy it to {self.remote.url}") from None

    def _check(self, window: int) -> None:
        for shard in self.info.shards:
            if not shard.name or "/" in shard.name or shard.name.startswith("."):
                raise UserError(
                    f"{self.remote.name(INFO_NAME)} has a shard {shard.name!r}, which is no file name"
                )
        largest = sorted(self.info.shards, key=lambda shard: shard.bytes, reverse=True)[:window]
        if not self.fits(largest):
            need = sum(map(_bytes, largest))
            raise UserError(
                f"data.cache_bytes must hold the shards that are read at once, {need:,} bytes for "
                f"data.window_shards {window}, got {self._cache.limit:,}; raise it, best to twice that, or "
                "lower data.window_shards"
            )


def _bytes(shard: ShardEntry) -> int:
    return shard.bytes + index_bytes(shard.samples)


def index_bytes(samples: int) -> int:
    """Size of a shard's index file."""
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int64)), "fortran_order": False}
    np.lib.format.write_array_header_1_0(header, {**layout, "shape": (samples, 4)})
    return header.tell() + 4 * 8 * samples
