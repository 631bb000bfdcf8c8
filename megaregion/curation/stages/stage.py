"""A stage: one step of curation, cut into pieces that need nothing of each other.

A piece is a pure function of the stage's settings, of its slice of the images and of the finished pieces
that it needs; so a piece can run anywhere and at any time, and is done again when one of these changes.

    OUT/stages/STAGE/00003/manifest.json and the piece's files; shards lie in OUT/shards

The manifest is written last and names every file with its size and hash. A piece without one, or whose
files differ from it, is half-written and will be done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.inputs.source import ImageFile, Source
from megaregion.curation.picture import BadImage, Kept, Picture, read_picture
from megaregion.curation.settings import CurationSettings
from megaregion.errors import UserError
from megaregion.files import file_sha256, new_file, read_json, write_bytes

WEIGHTS = (".json", ".safetensors", ".onnx", ".yml", ".yaml", ".txt")
"""Endings of the files that make up a model."""
VERSION = 1
"""Version of the manifest's layout."""
LOOKAHEAD = 8
"""Images that each decoder has ready."""
MANY = 1000
"""Manifests of a stage from which on it is worth while to keep what was read of them."""
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What goes wrong where a manifest is missing, half-written or another program's."""
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


class Glance(NamedTuple):
    """What tells whether a finished piece is up to date, and how long it took."""

    digest: str
    recipes: str
    """Hash of the manifest's."""
    seconds: float


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
    """Turn a full disk, and what stands in the way in a run's folder, into a UserError."""
    try:
        yield
    except OSError as error:
        path = str(error.filename2 or error.filename or "")
        if error.errno in _IN_THE_WAY and Path(path).is_relative_to(root):
            raise UserError(
                f"{path} cannot be written ({error.strerror}); "
                "remove what is in the way, or choose another --out"
            ) from None
        if error.errno == errno.ENOENT and Path(path).is_relative_to(root):
            raise UserError(f"{path} was removed while curation ran; run again") from None
        # numpy tells of a short write in words alone.
        short = error.errno is None and "requested and" in str(error)
        if not short and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"no space left in {root}; free some and run again, what is done is kept") from None


class Store:
    """The pieces below one run's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, dict[str, list[Any]]] = {}
        """What was read of each stage's manifests, by their numbers, and what each stood for."""
        self._read_anew = Counter[str]()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.root,)

    def folder(self, piece: Piece) -> Path:
        """Where a piece's files lie."""
        return Path(self._folder(piece))

    def _folder(self, piece: Piece) -> str:
        # Plain text: a status of a quarter of a million manifests spends most of its time on paths.
        return f"{self.root}/stages/{piece.stage}/{piece.number:05d}"

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
            manifest = self._parse(piece)
            whole = all(
                self._is_whole(path, size, sha if thorough else None)
                for path, (size, sha) in manifest.files.items()
            )
        except BROKEN:
            return None
        return manifest if whole else None

    def glance(self, piece: Piece) -> Glance | None:
        """What matters of a manifest whose files have their sizes; it is read again where it changed."""
        rows = self._rows(piece.stage)
        try:
            state = os.stat(f"{self._folder(piece)}/manifest.json")  # noqa: PTH116
            row = rows.get(str(piece.number))
            if row is None or row[:2] != [state.st_ino, state.st_mtime_ns]:
                manifest = self._parse(piece)
                sizes = {path: size for path, (size, _) in manifest.files.items()}
                # Pieces of a stage name the same recipes.
                told = Glance(manifest.digest, _hash_of(*manifest.recipes.items()), manifest.seconds)
                row = rows[str(piece.number)] = [state.st_ino, state.st_mtime_ns, sizes, *told]
                self._read_anew[piece.stage] += 1
            for path, size in row[2].items():
                if not self._is_whole(path, size, None):
                    return None
        except BROKEN:
            return None
        return Glance(*row[3:])

    def glances(self, stage: str, pieces: int) -> list[Glance | None]:
        """The same of all pieces of a stage; of many, what was read is kept for the next process."""
        found = [self.glance(Piece(stage, number)) for number in range(pieces)]
        if self._read_anew.pop(stage, 0) >= MANY:
            # Another user may look at a run, too.
            with suppress(OSError), new_file(self._index(stage), shared=True, durable=False) as file:
                file.write(json.dumps({"version": VERSION, "rows": self._known[stage]}).encode())
        self._known.pop(stage, None)
        return found

    def _rows(self, stage: str) -> dict[str, list[Any]]:
        if stage not in self._known:
            self._known[stage] = {}
            with suppress(*BROKEN):
                content = read_json(self._index(stage))
                if content["version"] == VERSION:
                    self._known[stage] = dict(content["rows"])
        return self._known[stage]

    def _index(self, stage: str) -> Path:
        return self.root / "stages" / stage / ".finished.json"

    def _parse(self, piece: Piece) -> Manifest:
        """Raises one of BROKEN."""
        content = read_json(f"{self._folder(piece)}/manifest.json")
        manifest = Manifest(**{**content, "files": {k: tuple(v) for k, v in content["files"].items()}})
        if manifest.version != VERSION:
            raise ValueError
        return manifest

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
        path = f"{self.root}/{name}"
        found = os.stat(path)  # noqa: PTH116
        same = stat.S_ISREG(found.st_mode) and found.st_size == size
        return same and (sha256 is None or file_sha256(Path(path)) == sha256)


@dataclass(frozen=True)
class Job:
    """What all stages of a run share."""

    settings: CurationSettings
    source: Source
    store: Store
    decoders: int = 0
    """Processes beside a worker that decode images for it; with 0 it does so itself."""
    kept: Kept = field(default_factory=Kept)
    """Pictures that this process has decoded for the stages of one piece."""

    @property
    def shards(self) -> Path:
        """The dataset's folder."""
        return self.store.root / "shards"

    def read(self, image: ImageFile, decode: bool = True) -> Picture:
        """Decode an image; raises BadImage where it cannot be used, UserError where it is gone or changed.

        Without ``decode``, no more is done than :meth:`Picture.encode` needs.
        """
        settings, content = self.settings.image, self.source.read(image)
        return read_picture(content, settings.max_image_pixels, settings.min_image_side, decode)


class Stage(ABC):
    """One step of curation."""

    name: str
    """Unique, short; the name of its folder."""
    reads: tuple[str, ...] = ()
    """Earlier stages of which a piece reads the pieces of the same slices of the images; a whole one all."""
    reads_whole: tuple[str, ...] = ()
    """Earlier stages of one piece that a piece reads."""
    whole = False
    """A piece reads all earlier pieces and no image, and there is one if :meth:`pieces` says nothing else; or
    each piece has images of its own."""
    together = False
    """Several ranks, or all threads of one process, do a piece together; else each worker does its own."""
    version = 1
    """Raised when the same input would give another outcome, so that old pieces are done again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What, besides images and earlier pieces, the outcome depends on; JSON."""

    @abstractmethod
    def work(self, number: int, output: Output) -> None:
        """Do one piece; ``output`` takes files, counts and the images that could not be used."""

    def pieces(self) -> int:
        """Number of pieces."""
        return 1 if self.whole else self.job.source.slices

    def span(self, number: int) -> tuple[int, int]:
        """Positions of a piece's first image, and of the one after its last."""
        first, last = self.job.source.starts[number : number + 2].tolist()
        return first, last

    def count(self, number: int) -> int:
        """How often a piece ticks: the images that it covers, 1 without any."""
        first, last = (0, 1) if self.whole else self.span(number)
        return last - first

    def slices(self, number: int) -> range:
        """Slices in which a piece's images lie; all of them for a whole stage."""
        source = self.job.source
        return range(source.slices) if self.whole else source.overlapping(*self.span(number))

    def needs(self, number: int) -> list[Piece]:
        """Earlier pieces that a piece reads."""
        sliced = [Piece(stage, each) for stage in self.reads for each in self.slices(number)]
        return [*sliced, *(Piece(stage, 0) for stage in self.reads_whole)]

    def prepare(self) -> None:
        """Called once before pieces run, in the process that hands them out."""
        return

    def key(self, number: int, needed: Sequence[str]) -> str:
        """Hash of all that a piece's outcome depends on, given the digests of what :meth:`needs` names."""
        return hash_of([*self._origin, list(needed), self.identity(number)])

    def identity(self, number: int) -> list[Any]:
        """What a piece's outcome depends on among the images; JSON."""
        return [] if self.whole else self.job.source.identity(number)

    @cached_property
    def recipe(self) -> str:
        """Hash of what all pieces depend on alike: the stage itself and its settings."""
        return hash_of(self._origin)

    def path(self, piece: Piece, name: str) -> Path:
        """Where a file of a finished piece lies."""
        return self.job.store.folder(piece) / name

    def on_gpu(self) -> bool:
        """Whether its network runs on a GPU, if there is one: then one process a GPU does its pieces."""
        return False

    @cached_property
    def _origin(self) -> list[Any]:
        return [self.name, self.version, json.dumps(self.settings(), sort_keys=True)]


class ImageStage(Stage):
    """A stage that looks at images."""

    @abstractmethod
    def look(self, image: ImageFile, picture: Picture, wanted: Any) -> Any:
        """What :meth:`work` needs of an image; may be asked in another process. Raises BadImage."""

    def looks(
        self, wanted: Iterable[tuple[ImageFile, Any]], output: Output
    ) -> Iterator[tuple[ImageFile, Any]]:
        """Each image with its :meth:`look`, in order; a bad one is counted, named, and given with None."""
        images = list(wanted)
        for (image, _), seen in zip(images, self._feed(images), strict=True):
            if isinstance(seen, UserError):
                raise seen
            if isinstance(seen, BadImage):
                output.bad[image.path] = str(seen)
            yield image, None if isinstance(seen, BadImage) else seen
            output.tick()

    def images(self, number: int) -> Iterator[ImageFile]:
        """The images of a piece."""
        return self.job.source.between(*self.span(number))

    @cached_property
    def _feed(self) -> Feed:
        return Feed(type(self), self.job)


class Feed:
    """Looks at images in order; where a job has decoders, they do it and run ahead.

    As a data set of torch it lies in each of these processes, and as a sampler it says what they do next.
    """

    def __init__(self, kind: type[ImageStage], job: Job) -> None:
        self._kind, self._job = kind, job
        self._next: Sequence[tuple[ImageFile, Any]] = ()

    def __call__(self, images: Sequence[tuple[ImageFile, Any]]) -> Iterable[Any]:
        """What is seen in each image, or why it cannot be used."""
        if not self._job.decoders:
            return map(self.__getitem__, images)
        self._next = images
        return self._loader

    def __iter__(self) -> Iterator[tuple[ImageFile, Any]]:
        return iter(self._next)

    def __len__(self) -> int:
        return len(self._next)

    def __getitem__(self, item: tuple[ImageFile, Any]) -> Any:
        """What the stage sees in an image; a mistake is handed on, since torch would wrap it in its own."""
        image, wanted = item
        try:
            picture = self._job.kept.picture(image.path, lambda: self._job.read(image))
            return self._stage.look(image, picture, wanted)
        except (BadImage, UserError) as error:
            return error

    @cached_property
    def _stage(self) -> ImageStage:
        return self._kind(self._job)

    @cached_property
    def _loader(self) -> Iterable[Any]:
        from torch.utils.data import DataLoader

        return DataLoader(
            cast("Any", Feed(self._kind, self._job)),
            batch_size=None,
            sampler=self,
            collate_fn=_as_it_is,
            num_workers=self._job.decoders,
            persistent_workers=True,
            prefetch_factor=LOOKAHEAD,
            multiprocessing_context="spawn",
        )


def _as_it_is(seen: Any) -> Any:
    return seen


def hash_of(content: Any) -> str:
    """Hash of what JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def _hash_of(*recipes: tuple[str, str]) -> str:
    return hash_of(dict(recipes))


def recipes_of(name: str, stages: Mapping[str, Stage]) -> dict[str, str]:
    """Hash of the settings of a stage and of each before it, by name, and of the list of images."""
    recipes = {"images": stages[name].job.source.digest}
    waiting = [name]
    while waiting:
        stage = stages[waiting.pop()]
        recipes[stage.name] = stage.recipe
        waiting += {*stage.reads, *stage.reads_whole} - recipes.keys()
    return dict(sorted(recipes.items()))


def describe(folder: Path) -> str:
    """A short hash over a model's files, so that other weights count as another setting."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in WEIGHTS:
            digest.update(f"{path.relative_to(folder)}\0".encode() + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()[:16]


def plain(*groups: Any) -> dict[str, Any]:
    """Settings of several groups as one JSON object."""
    return {key: value for group in groups for key, value in asdict(group).items()}
