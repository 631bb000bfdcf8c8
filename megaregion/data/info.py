"""dataset.json: what a dataset holds, its label spaces, and the files that they come from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megaregion.errors import UserError

VERSION = 1
"""Version of the layout on disk, index included."""

INFO_NAME, CENTERS_NAME, TOKENIZER_NAME = "dataset.json", "centers.npy", "tokenizer.model"


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard, as dataset.json lists it."""

    name: str
    """File name without its ending; the files are NAME.tar and NAME.index.npy."""
    samples: int
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Hash of the tar file."""
    objects: int = 0
    """Object regions."""
    texts: int = 0
    """Text regions."""
    max_label: int = -1
    """Greatest object label; -1 without objects."""
    max_token: int = -1
    """Greatest token id; -1 without text."""


@dataclass(frozen=True)
class DatasetInfo:
    """What dataset.json says."""

    samples: int
    objects: int
    """Object regions of the whole dataset."""
    texts: int
    """Text regions of the whole dataset."""
    object_classes: int
    """Size K of the objects' label space: the number of centers."""
    text_classes: int
    """Size V of the text's label space: the tokenizer's vocabulary; 0 without text."""
    centers_sha256: str | None
    tokenizer_sha256: str | None
    shards: tuple[ShardEntry, ...]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard, in the order of the dataset's indices."""
        return tuple(shard.samples for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """The content of dataset.json."""
        return {
            "version": VERSION,
            "samples": self.samples,
            "regions": {"object": self.objects, "text": self.texts},
            "object_classes": self.object_classes,
            "text_classes": self.text_classes,
            "centers_sha256": self.centers_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "shards": [asdict(shard) for shard in self.shards],
        }


def write_dataset(
    folder: Path,
    shards: Sequence[ShardEntry],
    object_classes: int,
    text_classes: int,
    centers: Path | None = None,
    tokenizer: Path | None = None,
) -> DatasetInfo:
    """Finish a dataset: bring its label files into the folder and write dataset.json last.

    Args:
        folder: Where the shards already lie.
        shards: The shards in the order of the dataset.
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
        centers_sha256=_bring(centers, folder / CENTERS_NAME),
        tokenizer_sha256=_bring(tokenizer, folder / TOKENIZER_NAME),
        shards=tuple(shards),
    )
    replace_file(folder / INFO_NAME, json.dumps(info.to_dict(), indent=1).encode())
    return info


def read_info(folder: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        UserError: It is missing, of another version, or damaged.
    """
    path = Path(folder) / INFO_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; data.path must name a dataset that tools/curate.py has finished"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run tools/curate.py --stage pack again") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path} has version {version!r}, this program reads version {VERSION}; pack it again"
        )
    try:
        known = {field.name for field in fields(ShardEntry)}
        info = DatasetInfo(
            samples=content["samples"],
            objects=content["regions"]["object"],
            texts=content["regions"]["text"],
            object_classes=content["object_classes"],
            text_classes=content["text_classes"],
            centers_sha256=content["centers_sha256"],
            tokenizer_sha256=content["tokenizer_sha256"],
            shards=tuple(
                ShardEntry(**{key: value for key, value in shard.items() if key in known})
                for shard in content["shards"]
            ),
        )
        total = sum(info.shard_sizes)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); pack it again") from None
    if not info.shards or total != info.samples:
        raise UserError(f"{path} names {info.samples} samples, but its shards hold {total}; pack it again")
    return info


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _bring(source: Path | None, target: Path) -> str | None:
    if source is None:
        # A file of an earlier run would pass for this dataset's.
        target.unlink(missing_ok=True)
        return None
    if not target.exists() or not target.samefile(source):
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        partial.replace(target)
    return file_sha256(target)
