"""The images of a run, in slices: parts of a folder's listing, or of one tar each.

What :func:`megaregion.curation.inputs.find.find_images` found lies on disk; a process holds the slice that it
works on. Slices are numbered: first the loose files of the folder, sorted by path, then tar after tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.inputs.index import MAX_CAPTION, AnnotationIndex
from megaregion.curation.inputs.tars import Member, scan_tar
from megaregion.data.writer import MAX_KEY_BYTES
from megaregion.errors import UserError
from megaregion.files import read_json
from megaregion.schemas.curation import Kinds

if TYPE_CHECKING:
    from megaregion.curation.inputs.columnar import Columnar

FILES, TARS, INPUTS = "images.jsonl", "tars.jsonl", "inputs.json"
"""Below OUT/stages: loose images, tars, and what both add up to, which is written last."""
COLUMNAR = (".parquet", ".arrow")
"""Files of which a row may be an image."""
VERSION = 2
"""Version of these files' layout."""
_LEFT_OUT = {
    "duplicates": int, "others": int, "outputs": int, "formats": dict, "damaged": int, "bad": dict,
    "annotations": dict,
}  # fmt: skip
_FACTS = {"version": int, "folder": str, "digest": str, "kinds": dict, **_LEFT_OUT}
"""What inputs.json holds."""


class Cell(NamedTuple):
    """Where an image lies in a Parquet or Arrow file."""

    name: str
    """The number of its row."""
    row: int
    column: str


@dataclass(frozen=True)
class ImageFile:
    """One image of the input."""

    key: str
    """Name of the sample, unique in the dataset."""
    path: str
    """Where it lies, relative to the folder of images; TAR/NAME for a member of a tar, FILE/ROW for a row."""
    size: int
    """In bytes."""
    changed: int = 0
    """Time of the last change of the file, or of its tar, in nanoseconds."""
    sha256: str = ""
    """Hash of the content; empty for one in a larger file."""
    annotation: str = ""
    """Hash of the JSON file of the same name beside it; empty without one, or in a tar."""
    labels: str = ""
    """Hash of what other annotation files say of it; empty for nothing, or in a tar."""
    member: Member | Cell | None = None
    """Its place in its tar, or in its Parquet or Arrow file."""


class Source:
    """All images of a run, in slices of a size; cheap to hand to another process.

    Raises:
        UserError: There are no listings of this folder in ``place``.
    """

    def __init__(self, folder: Path, place: Path, slice_size: int) -> None:
        self.folder, self.place, self.slice_size = folder, place, slice_size
        try:
            found: dict[str, Any] = {
                "outputs": 0, "formats": {}, "annotations": {}, "kinds": {}, **read_json(place / INPUTS),
            }  # fmt: skip
            found.setdefault("damaged", len(found.get("bad", {})))
        except (OSError, ValueError, TypeError):
            found = {}
        whole = all(type(found.get(key)) is kind for key, kind in _FACTS.items()) and all(
            type(row) is list and len(row) == 2 for row in found["kinds"].values()
        )
        if not whole or found["version"] != VERSION or found["folder"] != str(folder.resolve()):
            raise UserError(
                f"{place.parent} has no list of the images in {folder}; "
                "run tools/curate.py --stage list first"
            )
        self.digest = f"{found['digest']}-{slice_size}"
        """Hash of all that slices depend on."""
        self.left_out: dict[str, Any] = {name: found[name] for name in _LEFT_OUT}
        """What is no image of the run, by the names that it has in a run's summary."""
        self.kinds = Kinds({kind: (count, examples) for kind, (count, examples) in found["kinds"].items()})
        """The same and all else that is no image, by kind; a list of an older version has none."""
        self._files, self._tars = Listing(place / FILES), Listing(place / TARS)
        self._index = AnnotationIndex(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self.folder, self.place, self.slice_size)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def files(self) -> int:
        """Images that were found, duplicates included."""
        return len(self) + int(self.left_out["duplicates"])

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Position of each slice's first image among all images, and their number, [slices + 1]."""
        images = np.diff(self._firsts)
        slices = -(-images // self.slice_size)
        sizes = np.full(slices.sum(), self.slice_size, dtype=np.int64)
        last = (np.cumsum(slices) - 1)[slices > 0]
        sizes[last] = (images - (slices - 1) * self.slice_size)[slices > 0]
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def loose(self) -> int:
        """Images that lie in no tar; they are the first ones."""
        return len(self._files)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.starts) - 1

    def images(self, number: int) -> list[ImageFile]:
        """The images of a slice."""
        tar, first = self._place_of(number)
        if tar is None:
            return [ImageFile(**row) for row in self._files.rows(first, first + self.slice_size)]
        row = self._tar(tar)
        if "column" in row:
            numbers = range(first, min(first + self.slice_size, row["images"]))
            keys = sample_keys([str(number) for number in numbers], row["key"] + "_")
            return [
                ImageFile(key, f"{row['path']}/{n}", 0, row["changed"], member=Cell(str(n), n, row["column"]))
                for n, key in zip(numbers, keys, strict=True)
            ]
        return self._members(tar)[first : first + self.slice_size]

    def identity(self, number: int) -> list[Any]:
        """What the outcome for a slice depends on; JSON."""
        tar, first = self._place_of(number)
        if tar is not None:
            row = self._tar(tar)
            count = min(self.slice_size, row["images"] - first)
            found = [row["path"], row["size"], row["changed"], first, count]
            # What lies beside a tar can change the key of its images.
            marked = row["key"] != plain_key(row["path"].rsplit(".", 1)[0])
            found += [row["key"]] if marked else []
            found += [f"column {row['column']}"] if "column" in row else []
            return [*found, {"labels": row["labels"]}] if row.get("labels") else found
        return [
            (
                image.key,
                image.sha256,
                *filter(None, (image.annotation, image.labels and f"labels {image.labels}")),
            )
            for image in self.images(number)
        ]

    def overlapping(self, first: int, last: int) -> range:
        """Slices that hold the images at positions first to last - 1."""
        begin, end = np.searchsorted(self.starts, [first, last - 1], side="right") - 1
        return range(int(begin), int(end) + 1)

    def between(self, first: int, last: int) -> Iterator[ImageFile]:
        """The images at positions first to last - 1."""
        for number in self.overlapping(first, last):
            start = int(self.starts[number])
            yield from self.images(number)[max(first - start, 0) : last - start]

    def read(self, image: ImageFile) -> bytes:
        """The content of an image.

        Raises:
            UserError: It is gone or not what it was when it was listed.
            BadImage: Its row in a Parquet or Arrow file holds none.
        """
        if isinstance(image.member, Cell):
            return self._columns(image, image.member).image(image.member.row)
        if image.member is not None:
            return self._part(image, image.member.image)
        return self._content(self.folder / image.path, image.sha256)

    def annotation(self, image: ImageFile) -> bytes | None:
        """What annotation files say, else the JSON file of the same name; raises as :meth:`read`."""
        if image.labels and self._index.digest(image.path) != image.labels:
            raise UserError(f"the annotations of {image.path} changed while curation ran; run again")
        record = self._index.record(image.path)
        if record is not None:
            return record
        if isinstance(image.member, Cell):
            return self._columns(image, image.member).annotation(image.member.row)
        if image.member is not None:
            part = image.member.annotation
            return None if part is None else self._part(image, part)
        if not image.annotation:
            return None
        return self._content((self.folder / image.path).with_suffix(".json"), image.annotation)

    def caption(self, image: ImageFile) -> str:
        """The text beside an image or in an annotation file, or nothing; raises as :meth:`read`."""
        member = image.member
        if isinstance(member, Cell):
            return self._columns(image, member).caption(member.row)
        if member is None or member.caption is None:
            return self._index.caption(image.path)
        return self._part(image, member.caption)[:MAX_CAPTION].decode("utf-8-sig", errors="replace").strip()

    def captions(self, number: int) -> str:
        """Hash of the captions of a slice that do not lie in its tar."""
        digest = hashlib.sha256()
        for image in self.images(number):
            digest.update(f"{self._index.caption(image.path)}\0".encode(errors="replace"))
        return digest.hexdigest()

    def _content(self, path: Path, sha256: str) -> bytes:
        with _reading(path):
            content = path.read_bytes()
        if sha256 and hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(f"{path} changed while curation ran; run again")
        return content

    def _part(self, image: ImageFile, part: tuple[int, int]) -> bytes:
        assert image.member is not None
        path, (offset, size) = self.folder / image.path[: -len(image.member.name) - 1], part
        with _reading(path), path.open("rb") as file:
            unchanged = os.fstat(file.fileno()).st_mtime_ns == image.changed
            file.seek(offset)
            content = file.read(size)
        if len(content) != size or not unchanged:
            raise UserError(f"{path} changed while curation ran; run again")
        return content

    def _columns(self, image: ImageFile, cell: Cell) -> Columnar:
        """The Parquet or Arrow file of an image; the one that was read last stays open."""
        from megaregion.curation.inputs.columnar import Columnar

        path = self.folder / image.path[: -len(cell.name) - 1]
        if self._opened is None or self._opened[0] != path:
            with _reading(path):
                unchanged = path.stat().st_mtime_ns == image.changed
                try:
                    self._opened = path, Columnar(path, cell.column)
                except ValueError:
                    unchanged = False
            if not unchanged or self._opened is None:
                raise UserError(f"{path} changed while curation ran; run again")
        return self._opened[1]

    _opened: tuple[Path, Columnar] | None = None

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """Position of the first loose image, of the first of each tar, and their number, [tars + 2]."""
        tars = np.fromiter((row["images"] for row in self._tars.rows()), dtype=np.int64)
        return np.cumsum(np.concatenate([[0, len(self._files)], tars]))

    def _place_of(self, number: int) -> tuple[int | None, int]:
        """Tar of a slice, None for loose files, and its first image there."""
        position = int(self.starts[number])
        part = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return part - 1 if part else None, position - int(self._firsts[part])

    def _tar(self, tar: int) -> dict[str, Any]:
        [row] = self._tars.rows(tar, tar + 1)
        return row

    def _members(self, tar: int) -> list[ImageFile]:
        """All images of a tar; those of the tar that was read last are remembered."""
        if self._scanned[0] != tar:
            row = self._tar(tar)
            path = self.folder / row["path"]
            with _reading(path):
                state = path.stat()
                members = scan_tar(path).members
            if (state.st_size, state.st_mtime_ns, len(members)) != (
                row["size"], row["changed"], row["images"],
            ):  # fmt: skip
                raise UserError(f"{path} changed while curation ran; run again")
            keys = sample_keys([member.name for member in members], row["key"] + "_")
            self._scanned = (
                tar,
                [
                    ImageFile(
                        key, f"{row['path']}/{member.name}", member.image.size, row["changed"], member=member
                    )
                    for key, member in zip(keys, members, strict=True)
                ],
            )
        return self._scanned[1]

    _scanned: tuple[int, list[ImageFile]] = (-1, [])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run again") from None


def plain_key(name: str) -> str:
    """Sample key of a name without its ending: a/b becomes a_b; it may be shared and too long."""
    return re.sub(r"[^\w-]", "_", name)


def sample_keys(names: Sequence[str], prefix: str = "") -> list[str]:
    """Sample keys of names without their endings, with a hash where a key is not unique or too long."""
    plain = [prefix + plain_key(name) for name in names]
    count = Counter(plain)
    return [
        mark_key(key, prefix + name) if count[key] > 1 or len(key.encode()) > MAX_KEY_BYTES else key
        for name, key in zip(names, plain, strict=True)
    ]


def mark_key(key: str, name: str) -> str:
    """A key made unique by the hash of the full name, and short enough."""
    mark = "-" + hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:12]
    return key.encode()[: MAX_KEY_BYTES - len(mark)].decode(errors="ignore") + mark


class Listing:
    """Reads any part of a listing; a process holds no more than that part.

    Beside PATH, its lines of JSON, lies PATH.offsets.npy: where each begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows(self, start: int = 0, stop: int = sys.maxsize) -> Iterator[dict[str, Any]]:
        """Lines start to stop - 1, in order; all if nothing is said."""
        stop = min(stop, len(self))
        if start >= stop:
            return
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[start]))
            for _ in range(stop - start):
                yield json.loads(file.readline())

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        offsets: NDArray[np.int64] = np.load(_beside(self.path), mmap_mode="r", allow_pickle=False)
        return offsets


def write_listing(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a listing of JSON objects; 8 bytes of memory are spent on each."""
    offsets = array("q", [0])
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row, separators=(",", ":")).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
    np.save(_beside(path), np.frombuffer(offsets, dtype=np.int64), allow_pickle=False)


def move_listing(path: Path, target: Path) -> None:
    """Put a listing in another one's place."""
    path.replace(target)
    _beside(path).replace(_beside(target))


class Known:
    """What an earlier listing knew of files, asked for in the order of paths."""

    def __init__(self, path: Path, believed: bool = True) -> None:
        self._rows = _old_rows(path) if believed else iter(())
        self._row = next(self._rows, None)

    def of(self, name: str, state: os.stat_result) -> dict[str, Any]:
        """The row of a file that has not changed since, or nothing."""
        while self._row is not None and self._row["path"] < name:
            self._row = next(self._rows, None)
        row = self._row or {}
        same = (name, state.st_size, state.st_mtime_ns)
        return row if (row.get("path"), row.get("size"), row.get("changed")) == same else {}


def _old_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an earlier listing, as far as it can be read; what is lost is looked at anew."""
    with suppress(OSError, ValueError):
        listing = Listing(path)
        yield from takewhile(
            lambda row: {"path", "size", "changed"} <= row.keys(), listing.rows(0, len(listing))
        )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets.npy")
