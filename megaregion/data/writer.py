"""Writes datasets: tar shards that `webdataset` can read, an index for each, and dataset.json last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from megaregion.data.info import CENTERS_NAME, INFO_NAME, TOKENIZER_NAME, DatasetInfo, ShardEntry
from megaregion.data.sample import SampleRecord
from megaregion.errors import UserError
from megaregion.files import known_sha256, new_file, partial_name, write_text

MAX_KEY_BYTES = 95
"""KEY.json must fit the 100 bytes of a tar header's name."""


class ShardWriter:
    """Writes one shard; it appears under its name complete, or not at all.

    with ShardWriter(folder, "shard-00000") as writer:
        writer.add(key, jpeg, record)
    entries.append(writer.entry)
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._partial = partial_name(self.folder / f"{name}.tar")
        self._file = self._partial.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._keys: set[str] = set()
        self._regions = {"object": 0, "text": 0}
        self._greatest = {"object": -1, "text": -1}
        self._entry: ShardEntry | None = None

    @property
    def entry(self) -> ShardEntry:
        """The finished shard; only after the writer has been left without an error."""
        if self._entry is None:
            raise RuntimeError(f"shard {self.name} is not finished")
        return self._entry

    def add(self, key: str, jpeg: bytes, record: SampleRecord) -> None:
        """Append one sample under a key that is unique in the dataset, without dots and slashes.

        Raises:
            UserError: The key is already in the shard, or cannot name a tar member.
        """
        if not key or set(key) & set("./\0") or len(key.encode()) > MAX_KEY_BYTES:
            raise UserError(
                f"sample key {key!r} must have 1 to {MAX_KEY_BYTES} bytes and neither dots nor slashes"
            )
        if key in self._keys:
            raise UserError(f"sample key {key!r} is already in {self.name}; keys must be unique")
        self._keys.add(key)
        content = record.to_json()
        image, text = self._member(f"{key}.jpg", jpeg), self._member(f"{key}.json", content)
        self._rows.append((image, len(jpeg), text, len(content)))
        for region in record.regions:
            self._regions[region.kind] += 1
            self._greatest[region.kind] = max(self._greatest[region.kind], *region.labels)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _member(self, name: str, content: bytes) -> int:
        header = tarfile.TarInfo(name)
        # No time and no owner: the same samples give the same bytes, and so the same hash.
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._size
        self._write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def _finish(self) -> None:
        if not self._rows:
            raise UserError(f"{self.folder / self.name}.tar would be empty; a shard needs a sample")
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        with new_file(self.folder / f"{self.name}.index.npy") as file:
            np.save(file, np.array(self._rows, dtype=np.int64), allow_pickle=False)
        self._partial.replace(self.folder / f"{self.name}.tar")
        self._entry = ShardEntry(
            name=self.name,
            samples=len(self._rows),
            bytes=self._size,
            sha256=self._hash.hexdigest(),
            objects=self._regions["object"],
            texts=self._regions["text"],
            max_label=self._greatest["object"],
            max_token=self._greatest["text"],
        )


def write_dataset(
    folder: Path,
    shards: Sequence[ShardEntry],
    object_classes: int,
    text_classes: int,
    centers: Path | None = None,
    tokenizer: Path | None = None,
) -> DatasetInfo:
    """Finish a dataset: copy its label files into the folder and write dataset.json last.

    Args:
        folder: Where the shards already lie.
        shards: In the order of the dataset.
        object_classes: Number of centers, K.
        text_classes: Size of the tokenizer's vocabulary, V; 0 without text.
        centers: File with the centers, float32 [K, C]; copied to centers.npy.
        tokenizer: The sentencepiece model; copied to tokenizer.model.

    Raises:
        UserError: There is no shard, two have one name, or a label lies outside its label space.
    """
    folder = Path(folder)
    if not shards or len({shard.name for shard in shards}) < len(shards):
        raise UserError(f"{folder} needs shards with distinct names, got {[shard.name for shard in shards]}")
    for shard in shards:
        for kind, greatest, classes in (
            ("object label", shard.max_label, object_classes),
            ("text token", shard.max_token, text_classes),
        ):
            if greatest >= classes:
                raise UserError(
                    f"{folder / shard.name}.tar has {kind} {greatest}, outside the label space of "
                    f"{classes} classes; label the shard again with the centers and tokenizer of this dataset"
                )
    if centers is not None:
        shape = np.load(centers, mmap_mode="r", allow_pickle=False).shape
        if len(shape) != 2 or shape[0] != object_classes:
            raise UserError(f"{centers} must hold {object_classes} centers, got an array of shape {shape}")
    info = DatasetInfo(
        samples=sum(shard.samples for shard in shards),
        objects=sum(shard.objects for shard in shards),
        texts=sum(shard.texts for shard in shards),
        object_classes=object_classes,
        text_classes=text_classes,
        centers_sha256=_copy_label_file(centers, folder / CENTERS_NAME),
        tokenizer_sha256=_copy_label_file(tokenizer, folder / TOKENIZER_NAME),
        shards=tuple(shards),
    )
    write_text(folder / INFO_NAME, json.dumps(info.to_dict(), indent=1))
    return info


def _copy_label_file(source: Path | None, target: Path) -> str | None:
    if source is None:
        # A file of an earlier run would pass for this dataset's.
        target.unlink(missing_ok=True)
        return None
    if not target.exists() or not target.samefile(source):
        partial = partial_name(target)
        shutil.copyfile(source, partial)
        partial.replace(target)
    return known_sha256(target)
