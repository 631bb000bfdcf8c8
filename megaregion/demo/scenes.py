"""Scenes by number: all that is in scene i of a part is a function of (seed, part, i), in any worker."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from PIL import Image

from megaregion.bounds import LARGE, Whole
from megaregion.data.sample import encode_mask
from megaregion.demo.assets import PARTS, Library, Part
from megaregion.demo.compose import OBJECTS, WORDS, Canvas, lay_background, place_object, write_word
from megaregion.demo.words import load_vocabulary
from megaregion.settings import check

Side = Annotated[int, Whole(96, 4096, "PX", advice="256 is usual")]
"""Letters of readable height need the least; beyond the most a scene costs memory and shows nothing more."""
QUALITY = (84, 93)
"""JPEG quality is drawn from here: lowest, and one above the highest."""
ATTEMPTS = 16
"""Compositions that are tried before a scene may lack an object or a word."""


@dataclass(frozen=True)
class SceneSettings:
    """What, besides the files, decides how the scenes look.

    Raises:
        UserError: A value does not make sense.
    """

    seed: Annotated[int, Whole(0, LARGE, "SEED")] = 0
    """Other scenes of the same files."""
    sizes: tuple[tuple[Side, Side], ...] = ((256, 256),)
    """Widths and heights in pixels; each scene draws one of them."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Scene:
    """A finished scene and the truth about it."""

    jpeg: bytes
    truth: dict[str, Any]
    """The scene's line of truth.jsonl."""


class SceneMaker:
    """Makes the scenes of one part."""

    def __init__(self, library: Library, settings: SceneSettings, part: Part) -> None:
        self._assets = library.part(part)
        self._vocabulary = load_vocabulary(part)
        self._settings = settings
        self._part = part

    def make(self, index: int) -> Scene:
        """Compose scene ``index`` and encode it.

        A composition in which fewer than the least number of objects or words found a place is
        thrown away, and the next attempt has its own random numbers.
        """
        for attempt in range(ATTEMPTS):
            rng = _generator(self._settings.seed, self._part, index, attempt)
            canvas = self._compose(rng)
            if len(canvas.placed) >= OBJECTS[0] and len(canvas.written) >= WORDS[0]:
                break
        return Scene(_encode(canvas.image, rng), _truth(f"{self._part}-{index:06d}", canvas))

    def _compose(self, rng: np.random.Generator) -> Canvas:
        sizes = self._settings.sizes
        canvas = Canvas(sizes[int(rng.integers(len(sizes)))])
        lay_background(canvas, self._assets, rng)
        for _ in range(int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))):
            place_object(canvas, self._assets, rng)
        for _ in range(int(rng.integers(WORDS[0], WORDS[1] + 1))):
            write_word(canvas, self._vocabulary, rng)
        return canvas


def _generator(seed: int, part: Part, index: int, attempt: int) -> np.random.Generator:
    place = (PARTS.index(part) << 56) | (index << 8) | attempt
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))


def _encode(image: Image.Image, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(*QUALITY)))
    return buffer.getvalue()


def _truth(key: str, canvas: Canvas) -> dict[str, Any]:
    objects = []
    for number, (placed, share) in enumerate(zip(canvas.placed, canvas.visible, strict=True), start=1):
        seen = canvas.owner == number
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        mask = encode_mask(seen)
        objects.append(
            {
                "class": placed.cutout.name,
                "instance": placed.cutout.instance,
                "box": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
                "mask": {"size": list(mask.size), "counts": list(mask.counts)},
                "visible": round(share, 3),
            }
        )
    words = [
        {
            "text": written.lettering.text,
            "box": list(written.box),
            "height": written.lettering.height,
            "angle": round(written.lettering.angle, 2),
        }
        for written in canvas.written
    ]
    width, height = canvas.size
    return {"key": key, "width": width, "height": height, "objects": objects, "words": words}
