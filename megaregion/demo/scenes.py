"""Scenes by number: all that is in scene i of a part is a function of (seed, part, i), in any worker.

A scene has cut-outs on a crop of a background and words on top, and tells what of each is visible.

Shapes: H x W pixels of the scene, h x w of a picture on it. `owner` [H, W] holds the number of the object
that is seen at each pixel, from 1; 0 is background, WORD is a word.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from megaregion.bounds import LARGE, Whole
from megaregion.data.sample import encode_mask
from megaregion.demo.assets import (
    PARTS,
    Assets,
    Box,
    Cutout,
    Library,
    Part,
    bounding_box,
    pick,
    read_background,
    read_cutout,
)
from megaregion.demo.words import Lettering, Vocabulary, draw_style, extent, letter, load_vocabulary
from megaregion.errors import UserError
from megaregion.settings import check

OBJECTS = (2, 4)
"""Fewest and most cut-outs of a scene, unless the settings say otherwise of training scenes."""
WORDS = (0, 3)
"""Fewest and most words of a scene, likewise."""
LEAST_VISIBLE = 0.6
"""Least share of an object that neither the border, nor other objects, nor words may hide."""
OBJECT_SIDES = (0.36, 0.68)
"""Longer side of an object, in parts of the scene's shorter side."""
LETTER_HEIGHTS = (22, 64)
"""Height of the letters in pixels of a scene of 256 pixels."""
TRIES = 24
"""Places that are tried for an object or word before it is left out."""
WORD = 255

Side = Annotated[int, Whole(96, 4096, "PX", advice="256 is usual")]
"""Letters of readable height need the least; beyond the most a scene costs memory and shows nothing more."""
QUALITY = (84, 93)
"""JPEG quality is drawn from here: lowest, and one above the highest."""
ATTEMPTS = 16
"""Compositions that are tried before a scene may lack an object or a word."""
Number = Annotated[int, Whole(0, 40)]  # Of objects or words; more than the most find no place.


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
    train_objects: tuple[Number, Number] = OBJECTS
    """Fewest and most cut-outs of a training scene; as many as find a place."""
    train_words: tuple[Number, Number] = WORDS
    """Fewest and most words of a training scene; as many as find a place."""

    def __post_init__(self) -> None:
        check(self)
        for name, (fewest, most) in (("objects", self.train_objects), ("words", self.train_words)):
            if fewest > most:
                raise UserError(f"train_{name}: the fewest, {fewest}, are more than the most, {most}")


class Scene(NamedTuple):
    """A finished scene and the truth about it."""

    jpeg: bytes
    truth: dict[str, Any]
    """The scene's line of truth.jsonl."""


class SceneMaker:
    """Makes the scenes of one part."""

    def __init__(self, library: Library, settings: SceneSettings, part: Part) -> None:
        self._assets, self._vocabulary = library.part(part), load_vocabulary(part)
        self._settings, self._part = settings, part
        train = part == "train"
        self._objects = settings.train_objects if train else OBJECTS
        self._words = settings.train_words if train else WORDS

    def make(self, index: int) -> Scene:
        """Compose a scene and encode it.

        A composition in which too few objects or words found a place is thrown away, and the next attempt has
        its own random numbers.
        """
        for attempt in range(ATTEMPTS):
            rng = _generator(self._settings.seed, self._part, index, attempt)
            canvas = self._compose(rng)
            # More find no place in some scenes, and another composition would not change that.
            if len(canvas.placed) >= min(self._objects[0], OBJECTS[0]) and len(canvas.written) >= WORDS[0]:
                break
        buffer = io.BytesIO()
        canvas.image.save(buffer, "JPEG", quality=int(rng.integers(*QUALITY)))
        return Scene(buffer.getvalue(), _truth(f"{self._part}-{index:06d}", canvas))

    def _compose(self, rng: np.random.Generator) -> Canvas:
        canvas = Canvas(pick(rng, self._settings.sizes))
        lay_background(canvas, self._assets, rng)
        for _ in range(int(rng.integers(self._objects[0], self._objects[1] + 1))):
            place_object(canvas, self._assets, rng)
        for _ in range(int(rng.integers(self._words[0], self._words[1] + 1))):
            write_word(canvas, self._vocabulary, rng)
        return canvas


def _generator(seed: int, part: Part, index: int, attempt: int) -> np.random.Generator:
    place = (PARTS.index(part) << 56) | (index << 8) | attempt
    return np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))


def _truth(key: str, canvas: Canvas) -> dict[str, Any]:
    objects = []
    for number, ((cutout, _), share) in enumerate(zip(canvas.placed, canvas.visible, strict=True), start=1):
        seen = canvas.owner == number
        mask = encode_mask(seen)
        objects.append(
            {
                "class": cutout.name,
                "instance": cutout.instance,
                "box": list(bounding_box(seen)),
                "mask": {"size": list(mask.size), "counts": list(mask.counts)},
                "visible": round(share, 3),
            }
        )
    words = [
        {"text": word.text, "box": list(box), "height": word.height, "angle": round(word.angle, 2)}
        for word, box in canvas.written
    ]
    width, height = canvas.size
    return {"key": key, "width": width, "height": height, "objects": objects, "words": words}


class Canvas:
    """A scene while it is being composed."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size)
        self.owner: NDArray[np.uint8] = np.zeros((size[1], size[0]), np.uint8)
        self.placed: list[tuple[Cutout, int]] = []
        """Objects, and the pixels that each would have, were nothing hidden."""
        self.written: list[tuple[Lettering, Box]] = []
        """Words, and the boxes of their letters."""
        self.visible: list[float] = []
        """Visible share of each object so far."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self.image.size

    def cover(self, solid: NDArray[np.bool_], left: int, top: int, owner: int) -> None:
        """Give the pixels of a picture to an object or to WORD."""
        inside, window = _overlap(solid, left, top, self.size)
        self.owner[window][inside] = owner
        counts = np.bincount(self.owner.ravel(), minlength=WORD + 1)
        self.visible = [float(counts[n]) / area for n, (_, area) in enumerate(self.placed, start=1)]

    def stays_visible(self, solid: NDArray[np.bool_], left: int, top: int) -> bool:
        """Whether all objects stay visible enough when a picture covers what is behind it."""
        inside, window = _overlap(solid, left, top, self.size)
        hidden = np.bincount(self.owner[window][inside], minlength=WORD + 1)
        if hidden[WORD]:
            return False
        return all(
            share - hidden[n] / area >= LEAST_VISIBLE
            for n, (share, (_, area)) in enumerate(zip(self.visible, self.placed, strict=True), start=1)
            if hidden[n]
        )


def lay_background(canvas: Canvas, assets: Assets, rng: np.random.Generator) -> None:
    """Fill the canvas with a random crop of a random background."""
    picture = read_background(pick(rng, assets.backgrounds))
    width, height = canvas.size
    largest = min(picture.width / width, picture.height / height)
    scale = largest * float(rng.uniform(0.55, 1.0))
    left = float(rng.uniform(0, picture.width - scale * width))
    top = float(rng.uniform(0, picture.height - scale * height))
    box = (left, top, left + scale * width, top + scale * height)
    crop = picture.resize(canvas.size, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas.image.paste(_jitter(crop, rng, 0.15))


def place_object(canvas: Canvas, assets: Assets, rng: np.random.Generator) -> None:
    """Put one random cut-out in front of the others, if it finds a place where all stay visible enough."""
    instances = assets.cutouts[pick(rng, assets.classes)]
    cutout = pick(rng, instances[pick(rng, sorted(instances))])
    side = float(rng.uniform(*OBJECT_SIDES)) * min(canvas.size)
    for attempt in range(TRIES):
        if attempt % 8 == 0:
            picture = _turned(read_cutout(cutout.path), side * 0.85 ** (attempt // 8), rng)
            solid = np.asarray(picture.getchannel("A")) > 127
            area = int(solid.sum())
        left = int(rng.integers(-picture.width // 5, max(canvas.size[0] - picture.width * 4 // 5, 1)))
        top = int(rng.integers(-picture.height // 5, max(canvas.size[1] - picture.height * 4 // 5, 1)))
        inside, _ = _overlap(solid, left, top, canvas.size)
        if area < 64 or inside.sum() < max(0.85 * area, 1) or not canvas.stays_visible(solid, left, top):
            continue
        _cast_shadow(canvas.image, picture, left, top, rng)
        canvas.image.paste(picture, (left, top), picture)
        canvas.placed.append((cutout, area))
        canvas.cover(solid, left, top, len(canvas.placed))
        return


def write_word(canvas: Canvas, vocabulary: Vocabulary, rng: np.random.Generator) -> None:
    """Write one random word on top, if it finds a place inside that hides no word and no object too much."""
    text = vocabulary.draw(rng)
    scale = min(canvas.size) / 256
    low, high = (round(height * scale) for height in LETTER_HEIGHTS)
    anchor = canvas.image.resize((8, 8), Image.Resampling.BOX).convert("L")
    for attempt in range(TRIES):
        column, row = int(rng.integers(8)), int(rng.integers(8))
        bright = int(anchor.getpixel((column, row))) > 118  # type: ignore[arg-type]
        style = draw_style(rng, (low, max(low, round(high * 0.93**attempt))), bright)
        widest = round(0.8 * canvas.size[0])
        if not _finds_room(canvas, extent(text, style, widest), column, row):
            continue
        word = letter(text, style, widest)
        if word.height < low - 1:
            continue
        left = round((column + 0.5) * canvas.size[0] / 8 - word.picture.width / 2)
        top = round((row + 0.5) * canvas.size[1] / 8 - word.picture.height / 2)
        left = min(max(left, -word.ink[0] + 2), canvas.size[0] - word.ink[2] - 2)
        top = min(max(top, -word.ink[1] + 2), canvas.size[1] - word.ink[3] - 2)
        solid = np.asarray(word.picture.getchannel("A")) > 127
        x0, y0, x1, y1 = word.ink
        solid[y0:y1, x0:x1] = True
        box = (left + x0, top + y0, left + x1, top + y1)
        if min(box[:2]) < 0 or box[2] > canvas.size[0] or box[3] > canvas.size[1]:
            continue
        if canvas.stays_visible(solid, left, top):
            canvas.image.paste(word.picture, (left, top), word.picture)
            canvas.cover(solid, left, top, WORD)
            canvas.written.append((word, box))
            return


def _finds_room(canvas: Canvas, size: tuple[int, int], column: int, row: int) -> bool:
    """Whether a box in the middle of this eighth of the canvas, moved inside, leaves all objects visible."""
    places = zip(size, canvas.size, (column, row), strict=True)
    left, top = (
        min(max(round((eighth + 0.5) * whole / 8 - own / 2), 2), whole - own - 2)
        for own, whole, eighth in places
    )
    return min(left, top) >= 0 and canvas.stays_visible(np.ones(size[::-1], bool), left, top)


def _turned(picture: Image.Image, side: float, rng: np.random.Generator) -> Image.Image:
    """Scale, flip, rotate and recolour a cut-out, and soften its edge as a lens would."""
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 8), max(round(picture.height * scale), 8))
    # Premultiplied alpha (RGBa) keeps the colour of transparent pixels out of the edge.
    picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    angle = float(np.clip(rng.normal(0, 7), -18, 18))
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    alpha = picture.getchannel("A").filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7))))
    picture = _jitter(picture.convert("RGB"), rng, 0.25)
    picture.putalpha(alpha)
    return picture


def _jitter(picture: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """Change saturation, contrast, brightness and tint a little."""
    for enhance in (ImageEnhance.Color, ImageEnhance.Contrast):
        picture = enhance(picture).enhance(float(rng.uniform(1 - strength, 1 + strength)))
    gains = rng.uniform(1 - strength, 1 + strength) * rng.uniform(1 - strength / 3, 1 + strength / 3, 3)
    ramp = np.arange(256)
    table = np.concatenate([np.clip(ramp * gain, 0, 255) for gain in gains])
    return picture.point(table.astype(np.uint8).tolist())


def _cast_shadow(
    image: Image.Image, picture: Image.Image, left: int, top: int, rng: np.random.Generator
) -> None:
    depth = max(picture.size) / 24
    radius = depth * float(rng.uniform(0.7, 1.6))
    pad = round(3 * radius) + 1
    shade = Image.new("L", (picture.width + 2 * pad, picture.height + 2 * pad))
    shade.paste(picture.getchannel("A"), (pad, pad))
    opacity = float(rng.uniform(0.2, 0.5))
    shade = shade.filter(ImageFilter.BoxBlur(radius)).point((opacity * np.arange(256)).astype(int).tolist())
    x = left - pad + round(float(rng.uniform(-1, 1)) * depth)
    y = top - pad + round(float(rng.uniform(0.3, 1.2)) * depth)
    image.paste((8, 8, 12), (x, y), shade)


def _overlap(
    solid: NDArray[np.bool_], left: int, top: int, size: tuple[int, int]
) -> tuple[NDArray[np.bool_], tuple[slice, slice]]:
    """The part of a picture [h, w] that lies on the canvas, and its window there."""
    height, width = solid.shape
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, size[0]), min(top + height, size[1])
    if x0 >= x1 or y0 >= y1:
        return np.zeros((0, 0), bool), (slice(0, 0), slice(0, 0))
    return solid[y0 - top : y1 - top, x0 - left : x1 - left], (slice(y0, y1), slice(x0, x1))
