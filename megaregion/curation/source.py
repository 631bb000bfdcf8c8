"""The images of a run: found, told apart by content, and named.

A picture file that occurs twice counts once. Content hashes are remembered by size and time of change, so
that only new files are read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megaregion.data.info import replace_file
from megaregion.data.writer import MAX_KEY_BYTES
from megaregion.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
"""Files that are taken for images, in lower or upper case."""


@dataclass(frozen=True)
class ImageFile:
    """One file of the input."""

    key: str
    """Name of the sample, unique in the dataset."""
    path: str
    """Where it lies, relative to the folder of images."""
    size: int
    """In bytes."""
    changed: int
    """Time of the last change, in nanoseconds."""
    sha256: str
    """Hash of the content."""


@dataclass(frozen=True)
class Source:
    """All images of a run, sorted by path."""

    folder: Path
    images: tuple[ImageFile, ...]
    duplicates: int
    """Files left out because another one has the same content."""
    others: int
    """Files whose ending is not an image's."""

    def read(self, image: ImageFile) -> bytes:
        """The content of a file.

        Raises:
            UserError: It is gone or not what it was when the run began.
        """
        try:
            content = (self.folder / image.path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.folder / image.path} cannot be read ({error.strerror}); run again"
            ) from None
        if hashlib.sha256(content).hexdigest() != image.sha256:
            raise UserError(f"{self.folder / image.path} changed while curation ran; run again")
        return content


def find_images(folder: Path, listing: Path, out: Path) -> Source:
    """Find the images below a folder; hidden files and folders are skipped.

    Args:
        folder: Where to look.
        listing: File that remembers the hashes from run to run.
        out: The run's own folder, which is skipped if it lies inside.

    Raises:
        UserError: There is no such folder, no image in it, or a file that may not be read.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder; give a folder of {', '.join(ENDINGS)} files")
    known = (
        {(i.path, i.size, i.changed): i.sha256 for i in read_listing(listing)} if listing.is_file() else {}
    )
    found: list[tuple[str, int, int, str]] = []
    others = 0
    for path in _walk(folder, out.resolve()):
        if path.suffix.lower() not in ENDINGS:
            others += 1
            continue
        state, name = path.stat(), path.relative_to(folder).as_posix()
        sha256 = known.get((name, state.st_size, state.st_mtime_ns)) or _hash(path)
        found.append((name, state.st_size, state.st_mtime_ns, sha256))
    if not found:
        raise UserError(f"--images {folder} holds no {', '.join(ENDINGS)} file among its {others} files")
    first = {sha256: name for name, _, _, sha256 in sorted(found, reverse=True)}
    unique = [entry for entry in sorted(found) if first[entry[3]] == entry[0]]
    keys = _keys([name for name, *_ in unique])
    images = tuple(ImageFile(key, *entry) for key, entry in zip(keys, unique, strict=True))
    write_listing(listing, images)
    return Source(folder, images, len(found) - len(unique), others)


def read_listing(path: Path) -> list[ImageFile]:
    """Read a listing; an unreadable one counts as empty, for it can be made again."""
    try:
        return [ImageFile(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError, UnicodeDecodeError):
        return []


def write_listing(path: Path, images: Sequence[ImageFile]) -> None:
    """Write a listing, one image a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, "".join(json.dumps(asdict(image)) + "\n" for image in images).encode())


def _walk(folder: Path, skipped: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        below = Path(parent)
        folders[:] = [n for n in folders if not n.startswith(".") and (below / n).resolve() != skipped]
        yield from (below / name for name in names if not name.startswith(".") and (below / name).is_file())


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None


def _keys(names: Sequence[str]) -> list[str]:
    """Sample keys from paths: a/b.jpg becomes a_b, with a hash where that is not unique or too long."""
    plain = [re.sub(r"[^\w-]", "_", name.rsplit(".", 1)[0]) for name in names]
    count = Counter(plain)
    keys = []
    for name, key in zip(names, plain, strict=True):
        if count[key] > 1 or len(key.encode()) > MAX_KEY_BYTES:
            mark = "-" + hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
            key = key.encode()[: MAX_KEY_BYTES - len(mark)].decode(errors="ignore") + mark
        keys.append(key)
    return keys
