"""What a curation would take of its input, and why not the rest, before it is started.

Every file and member is read once, and nothing is written but a list in a temporary folder. About a hundred
bytes of memory are spent on an image.

Shapes: n images.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaregion.curation.inputs.find import find_images
from megaregion.curation.inputs.source import ImageFile, Source
from megaregion.curation.picture import BadImage, read_picture
from megaregion.curation.settings import AnnotationSettings, ImageSettings
from megaregion.errors import UserError, spread
from megaregion.schemas.curation import DUPLICATE, SEVERAL, TABLE, TAR, Kinds
from megaregion.schemas.evaluation import aligned

IMAGE = "image"
USED, READ = (IMAGE, SEVERAL), (TAR, TABLE)
"""Kinds that a curation takes, and those of larger files that are read for them."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[], object]]]
"""Opens a progress bar for a number of images; what it gives is called for each."""


@dataclass(frozen=True)
class Check:
    """All files and members of a folder by what becomes of them."""

    folder: Path
    used: Kinds
    unusable: Kinds
    """Images that cannot be used, by reason."""
    left_out: Kinds
    """What is no image, and images that another one stands for."""

    @property
    def total(self) -> int:
        """How many there are; a folder that megaregion wrote counts as one."""
        return sum(count for part in (self.used, self.unusable, self.left_out) for count, _ in part.values())

    def table(self) -> str:
        """A line for each kind."""
        rows = [("used", "", "")]
        rows += [_row(kind, self.used) for kind in USED if kind in self.used]
        rows += [_row(kind, self.left_out) for kind in READ if kind in self.left_out]
        rows += [("not used", "", "")]
        for part in (self.unusable, self.left_out):
            rows += [_row(kind, part) for kind in sorted(part) if kind not in READ]
        rows += [("files and members", str(self.total), "")]
        # A path may hold bytes that are no text.
        return aligned(rows, left=(0, 2)).encode(errors="replace").decode()

    def to_json(self) -> str:
        """The same, for programs."""
        parts = {"used": self.used, "unusable": self.unusable, "left_out": self.left_out}
        content = {
            name: {
                kind: {"count": count, "examples": examples}
                for kind, (count, examples) in sorted(part.items())
            }
            for name, part in parts.items()
        }
        return json.dumps({"folder": str(self.folder), "total": self.total, **content}, indent=1)

    def no_use(self) -> UserError | None:
        """Why there is nothing to curate, if there is not."""
        if self.used:
            return None
        reasons = ", ".join(f"{kind} {count}" for kind, (count, _) in sorted(self.unusable.items()))
        return UserError(
            f"--images {self.folder} holds no usable image ({reasons}); mend them or name another folder"
        )


def check_images(
    folder: Path, out: Path, settings: ImageSettings, annotation: AnnotationSettings, bar: Bar, workers: int
) -> Check:
    """Look at all that lies below a folder as a curation into ``out`` would.

    Raises:
        UserError: There is no such folder, no image in it, or a file that cannot be read.
    """
    with tempfile.TemporaryDirectory() as place:
        source = find_images(
            folder, Path(place), out, settings.piece_images, workers, annotation, hashed=False
        )
        names = [IMAGE, SEVERAL, DUPLICATE]
        contents, verdicts = array("Q"), array("H")
        with bar("check", len(source)) as tick:
            for judged in spread(_Judge(source, settings), range(source.slices), workers):
                for content, name in judged:
                    if name not in names:
                        names.append(name)
                    contents.append(content)
                    verdicts.append(names.index(name))
                    tick()
        found = np.array(verdicts, dtype=np.int64)
        # Of loose images with the same content the first one counts, as in a curation.
        _, firsts = np.unique(np.array(contents[: source.loose], dtype=np.uint64), return_index=True)
        doubles = np.ones(source.loose, dtype=bool)
        doubles[firsts] = False
        found[: source.loose][doubles] = names.index(DUPLICATE)
        used, unusable, left_out = Kinds(), Kinds(), Kinds(source.kinds)
        for number, name in enumerate(names):
            places = np.flatnonzero(found == number).tolist()
            if places:
                paths = [image.path for place in places[:3] for image in source.between(place, place + 1)]
                part = used if name in USED else left_out if name == DUPLICATE else unusable
                part.add(name, *paths, count=len(places))
    return Check(folder, used, unusable, left_out)


class _Judge:
    """Says of each image of a slice what its content is, as 64 bits of a hash, and what becomes of it."""

    def __init__(self, source: Source, settings: ImageSettings) -> None:
        self._source, self._settings = source, settings

    def __call__(self, number: int) -> list[tuple[int, str]]:
        return [self._verdict(image) for image in self._source.images(number)]

    def _verdict(self, image: ImageFile) -> tuple[int, str]:
        digest = 0
        try:
            content = self._source.read(image)
            digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
            picture = read_picture(content, self._settings.max_image_pixels, self._settings.min_image_side)
        except BadImage as bad:
            return digest, str(bad)
        return digest, SEVERAL if picture.several else IMAGE


def _row(kind: str, part: Kinds) -> tuple[str, str, str]:
    count, examples = part[kind]
    return f"  {kind}", str(count), ", ".join(examples) + ", ..." * (count > len(examples))
