"""A WebDataset tar of the input: which images lie where in it, found from its headers alone.

Members of one sample share their name up to the first dot of its last part: 000120003.jpg, .txt and .json as
img2dataset writes them, or SA-1B's sa_1.jpg and sa_1.json. Nothing is ever extracted; an image is read from
its place in the tar.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Endings of members that are taken for images."""


class Part(NamedTuple):
    """Where a member's content lies in its tar, in bytes."""

    offset: int
    size: int


class Member(NamedTuple):
    """One image of a tar."""

    name: str
    """Its name in the tar up to the first dot, unique there."""
    image: Part
    annotation: Part | None
    """The JSON file of the same name, whatever it says."""


class Scan(NamedTuple):
    """What a tar holds."""

    members: list[Member]
    """In the order of the tar."""
    duplicates: int
    """Images left out because another one before them has the same name."""
    damage: str
    """What is wrong with the tar, or empty; the members before the damage are whole."""


def scan_tar(path: Path) -> Scan:
    """Read all headers of a tar."""
    images: dict[str, Part] = {}
    texts: dict[str, Part] = {}
    duplicates, damage = 0, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for name, part in _files(tar):
                sample, ending = _split(name)
                if ending in IMAGES:
                    duplicates += sample in images
                    images.setdefault(sample, part)
                elif ending == "json":
                    texts.setdefault(sample, part)
            if not _ends_here(path, tar.offset):
                damage = "damaged header"
    except tarfile.ReadError as error:
        damage = "not a tar file" if not images and not texts else f"truncated ({error})"
    except (tarfile.TarError, EOFError, ValueError) as error:
        damage = f"damaged ({error})"
    size = path.stat().st_size
    whole = {name: part for name, part in images.items() if part.offset + part.size <= size}
    if len(whole) < len(images):
        damage = damage or "truncated"
    members = [Member(name, part, texts.get(name)) for name, part in whole.items()]
    return Scan(members, duplicates, damage)


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, Part]]:
    """Name and place of every plain file."""
    while (member := tar.next()) is not None:
        # tarfile remembers every header, which is a kilobyte each.
        tar.members.clear()  # type: ignore[attr-defined]
        if member.isreg() and not member.issparse():
            yield member.name, Part(member.offset_data, member.size)


def _split(name: str) -> tuple[str, str]:
    """Sample and lower-case ending of a member; hidden files have no ending that counts."""
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    sample = f"{folder}/{stem}" if folder and folder != "." else stem
    return sample, ending.lower() if stem else ""


def _ends_here(path: Path, offset: int) -> bool:
    """Whether a tar ends at an offset; tarfile takes a damaged header for the end, too."""
    with path.open("rb") as file:
        file.seek(offset)
        return not any(file.read(tarfile.BLOCKSIZE))
