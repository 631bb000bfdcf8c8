"""The words that scenes show, and pictures of them: fonts, colours, plates, outlines, the place of the ink.

Words are ordinary English, and numbers as signs carry them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megaregion.demo.assets import Box, Part, pick, split_names
from megaregion.errors import UserError

WORD_FILE = Path(__file__).with_name("words.txt")

NUMBER_SHARE = 0.1
"""Share of the words of a scene that are numbers."""

FACES = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-BoldItalic.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    *("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralBolIta.ttf"),
    *("cmr10.ttf", "cmss10.ttf", "cmtt10.ttf", "cmb10.ttf"),
)
"""Font files that matplotlib brings; all of them have the letters, digits and signs of the vocabulary."""

Colour = tuple[int, int, int]

LIGHT: tuple[Colour, ...] = (
    *((255, 255, 255), (255, 246, 214), (255, 226, 64), (255, 178, 54), (190, 240, 255)),
    *((200, 255, 190), (255, 205, 220), (235, 235, 235)),
)
DARK: tuple[Colour, ...] = (
    *((12, 12, 14), (20, 32, 90), (120, 12, 20), (14, 70, 34), (80, 20, 96), (64, 36, 14)),
    *((0, 74, 128), (46, 46, 50)),
)


@dataclass(frozen=True)
class Vocabulary:
    """The words and numbers that one part's scenes may show; words are in lower case."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]

    def draw(self, rng: np.random.Generator) -> str:
        """A random word in the case in which a sign would have it, or a number."""
        if self.numbers and rng.random() < NUMBER_SHARE:
            return pick(rng, self.numbers)
        word = pick(rng, self.words)
        return (word.upper(), word.capitalize(), word)[int(rng.choice(3, p=(0.5, 0.25, 0.25)))]


def load_vocabulary(part: Part, path: Path = WORD_FILE) -> Vocabulary:
    """The words of one part; no word, in whatever case, is in two parts.

    Raises:
        UserError: The file has too few words to give every part some.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    words = {word.lower() for line in lines if not line.startswith("#") for word in line.split()}
    chosen = _of_part(sorted(words), part)
    if not chosen:
        raise UserError(f"{path} has too few words for the part {part!r}; give it at least 3")
    return Vocabulary(chosen, _of_part(_numbers(), part))


def _of_part(names: Sequence[str], part: Part) -> tuple[str, ...]:
    parts = split_names(names)
    return tuple(name for name in names if parts[name] == part)


def _numbers() -> list[str]:
    """Numbers as they stand on signs: house numbers, years, discounts and times."""
    plain = [str(number) for number in (*range(10, 100), *range(100, 1000, 50), *range(1950, 2030, 5))]
    percents = [f"{number}%" for number in range(10, 100, 5)]
    times = [f"{hour}:{minute:02d}" for hour in range(7, 23) for minute in (15, 30, 45)]
    return plain + percents + times


@dataclass(frozen=True)
class Lettering:
    """A word that is ready to be put on a scene."""

    text: str
    picture: Image.Image
    """RGBA, rotated, with plate or outline."""
    ink: Box
    """Box of the letters alone in the picture, x1 and y1 exclusive."""
    height: float
    """Height of the letters before rotation, in pixels."""
    angle: float
    """Rotation against the clock, in degrees."""


@dataclass(frozen=True)
class WordStyle:
    """How a word looks; a function of the random draw alone."""

    face: str
    height: int
    """Wanted height of the letters, in pixels."""
    angle: float
    plated: bool
    outlined: bool
    ink: Colour
    ground: Colour


def draw_style(rng: np.random.Generator, heights: tuple[int, int], bright_ground: bool) -> WordStyle:
    """A random style that keeps the letters readable; small heights, in pixels, are likelier.

    `bright_ground` says whether the scene is bright where the word will stand.
    """
    plated = bool(rng.random() < 0.45)
    light_ink = bool(rng.random() < 0.5) if plated else not bright_ground
    low, high = heights
    inks, grounds = (LIGHT, DARK) if light_ink else (DARK, LIGHT)
    return WordStyle(
        face=pick(rng, FACES),
        height=round(low + (high - low) * float(rng.random()) ** 1.6),
        angle=float(rng.normal(0, 4) if rng.random() < 0.75 else rng.uniform(-22, 22)),
        plated=plated,
        outlined=not plated and bool(rng.random() < 0.7),
        ink=pick(rng, inks),
        ground=pick(rng, grounds),
    )


def letter(text: str, style: WordStyle, widest: int) -> Lettering:
    """Draw a word at most `widest` pixels wide; a longer word becomes smaller."""
    font = _fitting_font(text, style, widest)
    left, top, right, bottom = font.getbbox(text)
    width, height = int(right - left), int(bottom - top)
    border = max(2, round(0.35 * style.height)) if style.plated else max(2, style.height // 8)
    size = (width + 2 * border, height + 2 * border)
    origin = (border - left, border - top)
    picture = _ground(size, style)
    stroke = max(1, round(height / 18)) if style.outlined else 0
    ImageDraw.Draw(picture).text(
        origin, text, (*style.ink, 255), font, stroke_width=stroke, stroke_fill=(*style.ground, 255)
    )
    ink = Image.new("L", size)
    ImageDraw.Draw(ink).text(origin, text, font=font, fill=255)
    if abs(style.angle) > 0.5:
        # Transparent pixels keep the colour of the ground, or rotation would draw a dark rim.
        picture = picture.convert("RGBa").rotate(style.angle, Image.Resampling.BICUBIC, expand=True)
        picture = picture.convert("RGBA")
        ink = ink.rotate(style.angle, Image.Resampling.BILINEAR, expand=True)
    box = ink.point(lambda value: 255 if value > 96 else 0).getbbox()
    return Lettering(text, picture, box or (0, 0, *ink.size), float(height), style.angle)


def extent(text: str, style: WordStyle, widest: int) -> tuple[int, int]:
    """About the width and height that the ink of `letter` has, without drawing it."""
    left, top, right, bottom = _fitting_font(text, style, widest).getbbox(text)
    width, height, turn = right - left, bottom - top, math.radians(abs(style.angle))
    across, up = math.cos(turn), math.sin(turn)
    return int(width * across + height * up), int(width * up + height * across)


def _ground(size: tuple[int, int], style: WordStyle) -> Image.Image:
    picture = Image.new("RGBA", size, (*style.ground, 0))
    if style.plated:
        ImageDraw.Draw(picture).rounded_rectangle(
            (0, 0, size[0] - 1, size[1] - 1),
            radius=style.height * 0.3,
            fill=(*style.ground, 255),
            outline=(*(style.ink if style.height % 2 else style.ground), 255),
            width=max(1, style.height // 14),
        )
    return picture


def _fitting_font(text: str, style: WordStyle, widest: int) -> ImageFont.FreeTypeFont:
    """The font size at which the letters of this word are as high as wanted and no wider than the room."""
    trial = _font(style.face, 64)
    left, top, right, bottom = trial.getbbox(text)
    size = 64 * style.height / max(bottom - top, 1)
    room = 64 * widest / max(right - left, 1)
    return _font(style.face, max(8, round(min(size, room))))


@lru_cache(maxsize=1024)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    path = font_folder() / face
    if not path.is_file():
        raise UserError(f"{path} is missing; install matplotlib again, its fonts write the demo's words")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@cache
def font_folder() -> Path:
    """Folder of the fonts that come with matplotlib."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
