"""A stage: one step of curation, cut into pieces that need nothing of each other.

A piece is a pure function of the stage's settings, of its slice of the images and of the finished pieces
that it needs; so a piece can run anywhere and at any time, and is done again when one of these changes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megaregion.curation.inputs.source import ImageFile, Source
from megaregion.curation.picture import BadImage, Picture, read_picture
from megaregion.curation.settings import CurationSettings
from megaregion.curation.stages.store import Output, Piece, Store
from megaregion.files import file_sha256

WEIGHTS = (".json", ".safetensors", ".onnx", ".yml", ".yaml", ".txt")
"""Endings of the files that make up a model."""


@dataclass(frozen=True)
class Job:
    """What all stages of a run share."""

    settings: CurationSettings
    source: Source
    store: Store

    @property
    def shards(self) -> Path:
        """The dataset's folder."""
        return self.store.root / "shards"

    def read(self, image: ImageFile) -> Picture:
        """Decode an image.

        Raises:
            BadImage: It cannot be used.
            UserError: The file is gone or changed.
        """
        settings = self.settings.image
        return read_picture(self.source.read(image), settings.max_image_pixels, settings.min_image_side)


class Stage(ABC):
    """One step of curation."""

    name: str
    """Unique, short; the name of its folder."""
    reads: tuple[str, ...] = ()
    """Earlier stages of which a piece reads the pieces of the same slices of the images; a whole one all."""
    reads_whole: tuple[str, ...] = ()
    """Earlier stages of one piece that a piece reads."""
    whole = False
    """One piece for the whole run, which reads earlier pieces only; else each piece has images of its own."""
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
        return _hash([*self._origin, list(needed), self.identity(number)])

    def identity(self, number: int) -> list[Any]:
        """What a piece's outcome depends on among the images; JSON."""
        return [] if self.whole else self.job.source.identity(number)

    @cached_property
    def recipe(self) -> str:
        """Hash of what all pieces depend on alike: the stage itself and its settings."""
        return _hash(self._origin)

    def path(self, piece: Piece, name: str) -> Path:
        """Where a file of a finished piece lies."""
        return self.job.store.folder(piece) / name

    def pictures(self, number: int, output: Output) -> Iterator[tuple[ImageFile, Picture | None]]:
        """Each image of a piece, decoded; a bad one is counted, named, and given without its picture."""
        for image in self.job.source.between(*self.span(number)):
            picture = None
            try:
                picture = self.job.read(image)
            except BadImage as bad:
                output.bad[image.path] = str(bad)
            yield image, picture
            output.tick()

    @cached_property
    def _origin(self) -> list[Any]:
        return [self.name, self.version, json.dumps(self.settings(), sort_keys=True)]


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
