"""A WebDataset tar of the input: which images lie where in it, found from its headers alone.

An image is named by its path up to its ending: 000120003.jpg as img2dataset writes it beside .txt and .json,
SA-1B's sa_1.jpg beside sa_1.json, 22.05.png. Nothing is ever extracted; an image is read from its place in
the tar.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megaregion.curation.picture import ENDINGS, NO_IMAGES, OTHER_FORMATS, begins_like_an_image
from megaregion.schemas.curation import BESIDE, DUPLICATE, FORMAT, HIDDEN, OTHER, Kinds

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}
"""How compressed files begin: nothing can be read in place from them."""


class Part(NamedTuple):
    """Where a member's content lies in its tar, in bytes."""

    offset: int
    size: int


class Member(NamedTuple):
    """One image of a tar."""

    name: str
    """Its path in the tar without the ending, unique there."""
    image: Part
    annotation: Part | None
    """The JSON file of the same name, whatever it says."""
    caption: Part | None = None
    """The .txt file of the same name."""


class Scan(NamedTuple):
    """What a tar holds."""

    members: list[Member]
    """In the order of the tar."""
    kinds: Kinds
    """What all other members are, folders left out."""
    damage: str
    """What is wrong with the tar, or empty; the members before the damage are whole."""


class _Header(tarfile.TarInfo):
    """A plain file's header of which no more is read than is asked here; any other is left to tarfile."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """One header; raises as tarfile does."""
        size, told = buf[124:135], buf[148:154]
        if buf[156:157] == b"0" and size.isdigit() and told.isdigit() and buf[135] in b" \0":
            with suppress(ValueError):
                if int(told, 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                    name, prefix = (bytes(part).partition(b"\0")[0] for part in (buf[:100], buf[345:500]))
                    path = prefix + b"/" + name if prefix else name
                    found = cls(path.decode(encoding, errors))
                    found.size = int(size, 8)
                    return found
        return super().frombuf(buf, encoding, errors)


def scan_tar(path: Path) -> Scan:
    """Read all headers of a tar."""
    images: dict[str, Part] = {}
    texts: dict[str, dict[str, Part]] = {".json": {}, ".txt": {}}
    rest: list[tuple[str, Part | None]] = []
    kinds, damage = Kinds(), ""
    try:
        with tarfile.open(path, "r:", tarinfo=_Header) as tar:
            for name, part in _members(tar):
                stem, ending = split_name(name)
                if name.rpartition("/")[2].startswith("."):
                    kinds.add(HIDDEN, name)
                elif part is None:
                    kinds.add(OTHER, name)
                elif ending in ENDINGS:
                    if stem in images:
                        kinds.add(DUPLICATE, name)
                    images.setdefault(stem, part)
                elif ending in OTHER_FORMATS:
                    kinds.add(FORMAT + ending, name)
                else:
                    rest.append((name, part))
                    if ending in texts:
                        texts[ending].setdefault(stem, part)
            damage = _behind(path, tar.offset)
    except tarfile.ReadError as error:
        damage = f"truncated ({error})" if images or rest else _no_tar(path)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        damage = f"damaged ({error})"
    size = path.stat().st_size
    whole = {name: part for name, part in images.items() if part.offset + part.size <= size}
    if len(whole) < len(images):
        damage = damage or "truncated"
    _tell_rest(path, rest, whole, kinds)
    return Scan(_with_texts(whole, texts), kinds, damage)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, Part | None]]:
    """Name of every member but folders, and its place if it is a plain file."""
    last = -1
    while (member := tar.next()) is not None:
        # tarfile goes back over a member of negative size, without end.
        if tar.offset <= last:
            raise tarfile.ReadError("a member ends before it begins")
        last = tar.offset
        # tarfile remembers every header, which is a kilobyte each.
        tar.members.clear()  # type: ignore[attr-defined]
        if not member.isdir():
            plain = member.isreg() and not member.issparse()
            yield member.name, Part(member.offset_data, member.size) if plain else None


def split_name(name: str) -> tuple[str, str]:
    """Path without the ending, and the ending in lower case; a hidden file has none that counts."""
    folder, _, last = name.rpartition("/")
    stem, dot, ending = last.rpartition(".")
    if not dot or last.startswith("."):
        return name, ""
    return (f"{folder}/{stem}" if folder and folder != "." else stem), f".{ending.lower()}"


def sample_of(stem: str) -> str:
    """The name that WebDataset gives to all members of a sample: up to the first dot of the last part."""
    folder, slash, last = stem.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _with_texts(images: dict[str, Part], texts: dict[str, dict[str, Part]]) -> list[Member]:
    """Images with the texts of the same name, or of the same sample where that has no other image."""
    alone = Counter(map(sample_of, images))

    def beside(stem: str, ending: str) -> Part | None:
        found, sample = texts[ending], sample_of(stem)
        return found.get(stem) or (found.get(sample) if alone[sample] == 1 else None)

    return [Member(stem, part, beside(stem, ".json"), beside(stem, ".txt")) for stem, part in images.items()]


def _tell_rest(
    path: Path, rest: list[tuple[str, Part | None]], images: dict[str, Part], kinds: Kinds
) -> None:
    """Tell what belongs to an image, is one by its first bytes and so joins them, or is something else."""
    samples = {sample_of(stem) for stem in images}
    with path.open("rb") as file:
        for name, part in rest:
            stem, ending = split_name(name)
            if sample_of(stem) in samples:
                kinds.add(BESIDE, name)
            elif (
                part is not None and ending not in NO_IMAGES and name not in images and _is_image(file, part)
            ):
                images[name] = part
            else:
                kinds.add(OTHER, name)


def _is_image(file: BinaryIO, part: Part) -> bool:
    whole = part.offset + part.size <= os.fstat(file.fileno()).st_size
    file.seek(part.offset)
    return whole and begins_like_an_image(file.read(min(part.size, 12)))


def _behind(path: Path, offset: int) -> str:
    """What is wrong where tarfile saw the end of a tar; it takes a damaged header for the end, too."""
    with path.open("rb") as file:
        file.seek(offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            return "damaged header"
        while block := file.read(2**20):
            if block.count(0) < len(block):
                return "members behind its end mark, as of tars that were joined; unpack it with tar -i"
    return ""


def _no_tar(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    kind = next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None)
    return "not a tar file" if kind is None else f"compressed by {kind}; decompress it first"
