"""Words as pictures: fonts, colours, plates and outlines, and the exact place of the ink.

Shapes: h x w pixels of a word's picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megaregion.errors import UserError

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
class Lettering:
    """A word that is ready to be put on a scene."""

    text: str
    picture: Image.Image
    """RGBA, rotated, with plate or outline."""
    ink: tuple[int, int, int, int]
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
    light_ink: bool
    ink: Colour
    ground: Colour


def draw_style(rng: np.random.Generator, heights: tuple[int, int], bright_ground: bool) -> WordStyle:
    """A random style that keeps the letters readable.

    Args:
        rng: Source of the draw.
        heights: Smallest and largest height of the letters, in pixels; small ones are likelier.
        bright_ground: Whether the scene is bright where the word will stand.
    """
    plated = bool(rng.random() < 0.45)
    light_ink = bool(rng.random() < 0.5) if plated else not bright_ground
    low, high = heights
    inks, grounds = (LIGHT, DARK) if light_ink else (DARK, LIGHT)
    return WordStyle(
        face=FACES[int(rng.integers(len(FACES)))],
        height=round(low + (high - low) * float(rng.random()) ** 1.6),
        angle=float(rng.normal(0, 4) if rng.random() < 0.75 else rng.uniform(-22, 22)),
        plated=plated,
        outlined=not plated and bool(rng.random() < 0.7),
        light_ink=light_ink,
        ink=inks[int(rng.integers(len(inks)))],
        ground=grounds[int(rng.integers(len(grounds)))],
    )


def letter(text: str, style: WordStyle, widest: int) -> Lettering:
    """Draw a word.

    Args:
        text: The word.
        style: Its looks.
        widest: Room in pixels; a longer word becomes smaller.
    """
    font = _fitting_font(text, style, widest)
    left, top, right, bottom = font.getbbox(text)
    width, height = int(right - left), int(bottom - top)
    border = max(2, round(0.35 * style.height)) if style.plated else max(2, style.height // 8)
    size = (width + 2 * border, height + 2 * border)
    origin = (border - left, border - top)
    picture = _ground(size, style)
    ImageDraw.Draw(picture).text(
        origin,
        text,
        font=font,
        fill=(*style.ink, 255),
        stroke_width=max(1, round(height / 18)) if style.outlined else 0,
        stroke_fill=(*style.ground, 255),
    )
    ink = Image.new("L", size)
    ImageDraw.Draw(ink).text(origin, text, font=font, fill=255)
    if abs(style.angle) > 0.5:
        # Transparent pixels keep the colour of the ground, or rotation would draw a dark rim.
        picture = picture.convert("RGBa").rotate(style.angle, Image.Resampling.BICUBIC, expand=True)
        picture = picture.convert("RGBA")
        ink = ink.rotate(style.angle, Image.Resampling.BILINEAR, expand=True)
    return Lettering(text, picture, _ink_box(ink), float(height), style.angle)


def _ground(size: tuple[int, int], style: WordStyle) -> Image.Image:
    picture = Image.new("RGBA", size, (*style.ground, 0))
    if style.plated:
        edge = max(1, style.height // 14)
        ImageDraw.Draw(picture).rounded_rectangle(
            (0, 0, size[0] - 1, size[1] - 1),
            radius=style.height * 0.3,
            fill=(*style.ground, 255),
            outline=(*style.ink, 255) if style.outlined or style.height % 2 else (*style.ground, 255),
            width=edge,
        )
    return picture


def _ink_box(ink: Image.Image) -> tuple[int, int, int, int]:
    box = ink.point(lambda value: 255 if value > 96 else 0).getbbox()
    return box if box is not None else (0, 0, *ink.size)


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
