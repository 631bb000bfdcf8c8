"""What finished pieces left on disk: their files, and a manifest that proves them whole.

    OUT/stages/STAGE/00003/manifest.json and the piece's files; shards lie in OUT/shards

The manifest is written last and names every file with its size and hash. A piece without one, or whose
files differ from it, is half-written and will be done again.
What stages hand on about each image is one JSON object a line, in the order of the images.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Proposal, Word
from megaregion.data.sample import RLE, Box
from megaregion.errors import UserError
from megaregion.files import file_sha256, new_file, read_json, write_bytes

VERSION = 1
"""Version of the manifest's layout."""
_IN_THE_WAY = (errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.EPERM, errno.EROFS)


class Piece(NamedTuple):
    """One independent piece of a stage's work."""

    stage: str
    number: int


@dataclass(frozen=True)
class Manifest:
    """What a finished piece says about itself."""

    key: str
    """Hash of all that the outcome depends on: settings, images, and the pieces that it read."""
    files: dict[str, tuple[int, str]]
    """Size and hash of each file, by path relative to the run's folder."""
    counts: dict[str, int]
    """What was counted on the way, by name."""
    bad: dict[str, str] = field(default_factory=dict)
    """Images that could not be used, by path, and why."""
    seconds: float = 0.0
    """Time that the piece took."""
    recipes: dict[str, str] = field(default_factory=dict)
    """Hash of the settings of this stage and of each before it, by name, and of the list of images."""
    version: int = VERSION

    @property
    def digest(self) -> str:
        """Hash of the files' content: what later pieces depend on."""
        return hashlib.sha256(json.dumps(sorted(self.files.items())).encode()).hexdigest()


class Output:
    """Collects what one piece, made from what ``key`` says, leaves behind in its folder."""

    def __init__(self, folder: Path, tick: Callable[[], None], key: str = "") -> None:
        self.folder, self.tick, self.key = folder, tick, key
        self.counts: Counter[str] = Counter()
        self.bad: dict[str, str] = {}
        self.files: list[Path] = []
        """Finished files of the piece, wherever they lie in the run's folder."""

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """Open a file of the piece for writing; it takes its name when it is complete."""
        path = self.folder / name
        with new_file(path, durable=False) as file:
            yield file
        self.files.append(path)

    def save(self, name: str, values: NDArray[Any]) -> None:
        """Write an array as a file of the piece."""
        with self.file(name) as file:
            np.save(file, values, allow_pickle=False)

    def kept(self, name: str) -> Path:
        """A file beside the piece's folder that outlives a kill, and goes when the piece is finished."""
        return self.folder.with_name(f".{self.folder.name}-{name}")


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn a full disk, and what stands in the way in a run's folder, into a clear message.

    Raises:
        UserError: Something there cannot be written.
    """
    try:
        yield
    except OSError as error:
        path = str(error.filename2 or error.filename or "")
        if error.errno in _IN_THE_WAY and Path(path).is_relative_to(root):
            raise UserError(
                f"{path} cannot be written ({error.strerror}); "
                "remove what is in the way, or choose another --out"
            ) from None
        # numpy tells of a short write in words alone.
        short = error.errno is None and "requested and" in str(error)
        if not short and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left in {root}; free some and run again, what is done is kept") from None


class Store:
    """The pieces below one run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, piece: Piece) -> Path:
        """Where a piece's files lie."""
        return self.root / "stages" / piece.stage / f"{piece.number:05d}"

    def load(self, piece: Piece, name: str, mapped: bool = False) -> NDArray[Any]:
        """An array that a finished piece left; mapped, only what is touched is read."""
        mode: Any = "r" if mapped else None
        found: NDArray[Any] = np.load(self.folder(piece) / name, mmap_mode=mode, allow_pickle=False)
        return found

    def read(self, piece: Piece, thorough: bool = True) -> Manifest | None:
        """The manifest of a finished piece, or None if it is missing or its files are not whole.

        Thorough reading compares the files' hashes, not only their sizes.
        """
        try:
            content = read_json(self.folder(piece) / "manifest.json")
            manifest = Manifest(**{**content, "files": {k: tuple(v) for k, v in content["files"].items()}})
            whole = manifest.version == VERSION and all(
                self._is_whole(path, size, sha if thorough else None)
                for path, (size, sha) in manifest.files.items()
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return manifest if whole else None

    def begin(self, piece: Piece, tick: Callable[[], None], key: str) -> Output:
        """Make room for a piece; what an earlier try left is gone."""
        folder = self.folder(piece)
        # The manifest first: if we are killed in between, nothing passes for finished.
        (folder / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Output(folder, tick, key)

    def finish(self, piece: Piece, output: Output, began: float, recipes: dict[str, str]) -> None:
        """Write the manifest of a piece begun at a time.monotonic(), and so declare it finished."""
        files = {
            path.relative_to(self.root).as_posix(): (path.stat().st_size, file_sha256(path))
            for path in output.files
        }
        seconds = round(time.monotonic() - began, 3)
        counts = dict(sorted((+output.counts).items()))
        self.write(piece, Manifest(output.key, files, counts, output.bad, seconds, recipes))
        for path in output.folder.parent.glob(output.kept("*").name):
            path.unlink()

    def write(self, piece: Piece, manifest: Manifest) -> None:
        """Write a piece's manifest."""
        write_bytes(self.folder(piece) / "manifest.json", json.dumps(asdict(manifest), indent=1).encode())

    def prune(self, stage: str, pieces: int) -> None:
        """Remove what a run with more pieces left."""
        for folder in sorted((self.root / "stages" / stage).glob("[0-9]*")):
            if not folder.name.isdigit() or int(folder.name) >= pieces:
                shutil.rmtree(folder, ignore_errors=True)

    def _is_whole(self, name: str, size: int, sha256: str | None) -> bool:
        path = self.root / name
        same = path.is_file() and path.stat().st_size == size
        return same and (sha256 is None or file_sha256(path) == sha256)


@dataclass(frozen=True)
class ImageRegions:
    """An image and the regions found in it, candidates or chosen ones."""

    key: str
    width: int = 0
    """0 if the image could not be used."""
    height: int = 0
    regions: Sequence[Proposal] = field(default_factory=tuple)


@dataclass(frozen=True)
class ImageWords:
    """An image and the words read in it."""

    key: str
    words: Sequence[Word] = field(default_factory=tuple)

    def above(self, confidence: float) -> list[Word]:
        """Words that were recognised with more than this confidence."""
        return [word for word in self.words if word.score > confidence]


def write_regions(file: BinaryIO, image: ImageRegions) -> None:
    """Append one image."""
    regions = [_from_region(region) for region in image.regions]
    _write(file, {"key": image.key, "width": image.width, "height": image.height, "regions": regions})


def read_regions(paths: Iterable[Path]) -> Iterator[ImageRegions]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        yield ImageRegions(line["key"], line["width"], line["height"], [*map(_to_region, line["regions"])])


def write_words(file: BinaryIO, image: ImageWords) -> None:
    """Append one image."""
    words = [{"text": w.text, "box": _rounded(w.box), "score": round(w.score, 4)} for w in image.words]
    _write(file, {"key": image.key, "words": words})


def read_words(paths: Iterable[Path]) -> Iterator[ImageWords]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        yield ImageWords(line["key"], [Word(w["text"], tuple(w["box"]), w["score"]) for w in line["words"]])


def _write(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        # Bytes, not text lines: a word may hold one of Unicode's other line ends.
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)


def _from_region(region: Proposal) -> dict[str, Any]:
    line: dict[str, Any] = {"box": _rounded(region.box), "score": round(region.score, 4)}
    if region.mask is not None:
        line["mask"] = {"size": region.mask.size, "counts": region.mask.counts}
    return line


def _to_region(line: dict[str, Any]) -> Proposal:
    mask = line.get("mask")
    rle = None if mask is None else RLE(tuple(mask["size"]), tuple(mask["counts"]))
    return Proposal(tuple(line["box"]), line["score"], rle)


def _rounded(box: Box) -> list[float]:
    """Hundredths of a pixel are enough, and keep the files small."""
    return [round(value, 2) for value in box]
