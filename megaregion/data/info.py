"""dataset.json: what a dataset holds, its label spaces, and the files that they come from.

Text labels are the distinct tokens of a region's text, by the same rule for shards and for evaluation.

Datasets that were labelled with the same centers or the same tokenizer share these classes; the classes of
others follow one another. A joined file of centers is known by the hash of the hashes of its parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megaregion.bounds import shown
from megaregion.errors import UserError
from megaregion.files import read_json

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


VERSION = 1
"""Version of the layout on disk, index included."""

INFO_NAME, CENTERS_NAME, TOKENIZER_NAME = "dataset.json", "centers.npy", "tokenizer.model"

WORD_START = "▁"
"""The piece that sentencepiece puts in front of a word; alone, it says nothing about the text."""


class ShardEntry(NamedTuple):
    """One finished shard, as dataset.json lists it; there may be 45,000."""

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

    @property
    def label_files(self) -> dict[str, str]:
        """SHA-256 of each file that the labels come from, by name."""
        files = {CENTERS_NAME: self.centers_sha256, TOKENIZER_NAME: self.tokenizer_sha256}
        return {name: sha256 for name, sha256 in files.items() if sha256 is not None}

    def notices(self) -> list[str]:
        """What a user who trains on it should know, a line each."""
        if self.object_classes != 1 or not self.objects:
            return []
        return [
            "the dataset has one object class, from which nothing can be told apart: its loss is 0 "
            "from the first step; curate with more --clusters"
        ]

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
            "shards": [shard._asdict() for shard in self.shards],
        }


def read_info(folder: Path) -> DatasetInfo:
    """Read dataset.json.

    Raises:
        UserError: It is missing, of another version, or damaged.
    """
    path = Path(folder) / INFO_NAME
    try:
        content = read_json(path)
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
        known = set(ShardEntry._fields)
        info = DatasetInfo(
            samples=content["samples"],
            objects=content["regions"]["object"],
            texts=content["regions"]["text"],
            object_classes=content["object_classes"],
            text_classes=content["text_classes"],
            centers_sha256=content["centers_sha256"],
            tokenizer_sha256=content["tokenizer_sha256"],
            shards=tuple(
                # Looking at every key of 45,000 shards takes as long as making their entries.
                ShardEntry(**shard)
                if shard.keys() <= known
                else ShardEntry(**{key: value for key, value in shard.items() if key in known})
                for shard in content["shards"]
            ),
        )
        _check_types(info)
        total = sum(info.shard_sizes)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); pack it again") from None
    if not info.shards or total != info.samples:
        raise UserError(f"{path} names {info.samples} samples, but its shards hold {total}; pack it again")
    return info


def _check_types(info: DatasetInfo) -> None:
    """See that numbers are whole and names are names of files beside dataset.json; raises TypeError."""
    columns: list[tuple[str, str, Sequence[Any]]] = [
        *((field.name, str(field.type), [getattr(info, field.name)]) for field in fields(DatasetInfo)),
        *(
            (name, "str" if name in ("name", "sha256") else "int", values)
            for name, values in zip(ShardEntry._fields, zip(*info.shards, strict=True), strict=False)
        ),
    ]
    for name, wanted, values in columns:
        if wanted == "int":
            wrong = [value for value in values if type(value) is not int or not -1 <= value < 2**63]
            _refuse(wrong, f"{name} must be a whole number")
        elif wanted in ("str", "str | None"):
            right = str if wanted == "str" else str | None
            _refuse([value for value in values if not isinstance(value, right)], f"{name} must be text")
        if name == "name":
            wrong = [v for v in values if not v.isprintable() or "/" in v or v[:1] in ("", ".")]
            _refuse(wrong, f"{name} must be the name of a file")
    if info.shards and min(info.shard_sizes) < 1:
        raise TypeError("samples must be 1 or more in every shard")
    if max(info.object_classes, info.text_classes) >= 2**31:
        raise TypeError("more classes than a label can name")


def _refuse(wrong: list[Any], why: str) -> None:
    if wrong:
        raise TypeError(f"{why}, got {shown(wrong[0])}")


def join(infos: Sequence[DatasetInfo], names: Sequence[str]) -> tuple[DatasetInfo, list[tuple[int, int]]]:
    """What dataset.json would say of all, and the first object and text class of each."""
    objects, object_classes, centers = _joined([(i.centers_sha256, i.object_classes) for i in infos])
    texts, text_classes, tokenizer = _joined([(i.tokenizer_sha256, i.text_classes) for i in infos])
    shards = [
        shard._replace(name=f"{name}/{shard.name}")
        for name, info in zip(names, infos, strict=True)
        for shard in info.shards
    ]
    info = DatasetInfo(
        samples=sum(info.samples for info in infos),
        objects=sum(info.objects for info in infos),
        texts=sum(info.texts for info in infos),
        object_classes=object_classes,
        text_classes=text_classes,
        centers_sha256=centers,
        tokenizer_sha256=tokenizer,
        shards=tuple(shards),
    )
    return info, list(zip(objects, texts, strict=True))


def _joined(files: Sequence[tuple[str | None, int]]) -> tuple[list[int], int, str | None]:
    """The first class of each dataset, the number of all classes, and the hash of what they come from."""
    firsts: list[int] = []
    known: dict[str, int] = {}
    total = 0
    for number, (sha256, classes) in enumerate(files):
        source = sha256 or f"dataset {number}"
        if classes and source not in known:
            known[source] = total
            total += classes
        firsts.append(known.get(source, 0))
    if len(known) < 2:
        return firsts, total, next((sha256 for sha256, classes in files if classes), None)
    return firsts, total, hashlib.sha256("\n".join(known).encode()).hexdigest()


def load_tokenizer(path: Path) -> SentencePieceProcessor:
    """Load a sentencepiece model.

    Raises:
        UserError: The file is missing or is no sentencepiece model.
    """
    from sentencepiece import SentencePieceProcessor

    if not path.is_file():
        raise UserError(f"{path} does not exist; tools/curate.py writes it beside the shards")
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{path} is no sentencepiece model ({error}); write it anew with tools/curate.py"
        ) from None


def token_set(processor: SentencePieceProcessor, text: str) -> tuple[int, ...]:
    """Tokenize a region's text, one word or several, into the set of classes that are its positives.

    Returns:
        Distinct token ids in order of first appearance, without the bare word-start piece, control
        pieces and the unknown piece; empty for text that has no other token.
    """
    skipped = {processor.piece_to_id(WORD_START)}
    tokens = dict.fromkeys(processor.encode(text))
    return tuple(
        token
        for token in tokens
        if token not in skipped and not processor.is_control(token) and not processor.is_unknown(token)
    )
