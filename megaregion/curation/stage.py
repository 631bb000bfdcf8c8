"""A stage: one step of curation, cut into pieces that need nothing of each other.

A piece is a pure function of the stage's settings, of its slice of the images and of the finished pieces
that it needs; so a piece can run anywhere and at any time, and is done again when one of these changes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megaregion.curation.picture import BadImage, Picture, read_picture
from megaregion.curation.settings import CurationSettings
from megaregion.curation.source import ImageFile, Source
from megaregion.curation.store import Manifest, Output, Piece, Store


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
    """One step of curation.

    Args:
        job: The run.
    """

    name: str
    """Unique, short; the name of its folder."""
    whole = False
    """One piece for the whole run, which reads earlier pieces only; else one for every slice of images."""
    version = 1
    """Raised when the same input would give another outcome, so that old pieces are done again."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What, besides images and earlier pieces, the outcome depends on; JSON."""

    @abstractmethod
    def work(self, number: int, output: Output) -> None:
        """Do one piece.

        Args:
            number: Which piece.
            output: Takes files, counts and the images that could not be used.
        """

    def slice_size(self) -> int:
        """Images of one slice."""
        return self.job.settings.image.piece_images

    def slices(self) -> int:
        """Number of slices that the images are cut into."""
        return -(-len(self.job.source.images) // self.slice_size())

    def pieces(self) -> int:
        """Number of pieces."""
        return 1 if self.whole else self.slices()

    def images(self, number: int) -> Sequence[ImageFile]:
        """The slice of images that a piece covers."""
        size = self.slice_size()
        return () if self.whole else self.job.source.images[number * size : (number + 1) * size]

    def needs(self, number: int) -> list[Piece]:
        """Earlier pieces that a piece reads."""
        return []

    def prepare(self) -> None:
        """Called once before pieces run, in the process that hands them out."""
        return

    def key(self, number: int, needed: Sequence[Manifest]) -> str:
        """Hash of all that a piece's outcome depends on.

        Args:
            number: Which piece.
            needed: Manifests of what :meth:`needs` names, in its order.
        """
        content = [self.name, self.version, self._settings_text, [m.digest for m in needed]]
        images = [(image.key, image.sha256) for image in self.images(number)]
        return hashlib.sha256(json.dumps([*content, images]).encode()).hexdigest()

    def path(self, piece: Piece, name: str) -> Path:
        """Where a file of a finished piece lies."""
        return self.job.store.folder(piece) / name

    def for_each(self, number: int, output: Output, use: Callable[[ImageFile, Picture | None], None]) -> None:
        """Decode every image of a piece; a bad one is counted, named, and handed on as None."""
        for image in self.images(number):
            try:
                picture: Picture | None = self.job.read(image)
            except BadImage as bad:
                picture = None
                output.bad[image.path] = str(bad)
            use(image, picture)
            output.tick()

    @cached_property
    def _settings_text(self) -> str:
        return json.dumps(self.settings(), sort_keys=True)


def plain(*groups: Any) -> dict[str, Any]:
    """Settings of several groups as one JSON object."""
    return {key: value for group in groups for key, value in asdict(group).items()}
