"""Images inside the page: crops and whole scenes as data URIs, regions drawn as SVG on top."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megaregion.evaluation.encoders import crop
from megaregion.evaluation.scenes import Scene, open_image

CROP_SIDE = 144
"""Longest side of a crop in the page, in pixels: twice what is shown, for dense screens."""
SCENE_SIDE = 640
"""Longest side of a whole scene in the page, in pixels."""


def data_uri(image: Image.Image, longest: int) -> str:
    """The image as a JPEG inside a URI, shrunk to this longest side."""
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


class Crops:
    """Crops of scenes as URIs; a scene that gives many crops is decoded once."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self._scenes = scenes
        self._images: dict[int, Image.Image] = {}

    def uri(self, scene: int, box: NDArray[np.float32]) -> str:
        """The box [4] of the scene at this place in the list, as a URI."""
        if scene not in self._images:
            self._images[scene] = open_image(self._scenes[scene])
        return data_uri(crop(self._images[scene], box), CROP_SIDE)


def scene_figure(scene: Scene) -> str:
    """Draw a scene with its objects and words boxed and named."""
    width, height = scene.width, scene.height
    letter = max(width, height) / 38
    told = f"scene {escape(scene.key)}"
    parts = [
        f'<svg class="scene" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">',
        f'<image href="{data_uri(open_image(scene), SCENE_SIDE)}" width="{width}" height="{height}"/>',
    ]
    tags = []
    named = [("object", item.name, item.box) for item in scene.objects]
    named += [("word", item.text, item.box) for item in scene.words]
    for kind, name, (x0, y0, x1, y1) in named:
        tag_width = (_ems(name) + 0.7) * letter
        # The tag sits on top of its box, or inside it where the image ends.
        tag_x = max(0.0, min(x0, width - tag_width))
        tag_y = y0 - 1.35 * letter if y0 > 1.4 * letter else y0
        parts.append(
            f'<rect class="box {kind}" x="{x0:.1f}" y="{y0:.1f}" '
            f'width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"/>'
        )
        tags.append(
            f'<rect class="tag {kind}" x="{tag_x:.1f}" y="{tag_y:.1f}" '
            f'width="{tag_width:.1f}" height="{1.35 * letter:.1f}"/>'
            f'<text class="tag-text" x="{tag_x + 0.35 * letter:.1f}" y="{tag_y + letter:.1f}" '
            f'font-size="{letter:.1f}">{escape(name)}</text>'
        )
    # All tags lie above all boxes, or a neighbour's border would strike a name through.
    return "".join([*parts, *tags, "</svg>"])


def _ems(text: str) -> float:
    """About how wide a text is in a bold sans-serif, in letter heights; the page has no font to measure."""
    return sum(0.74 if letter.isupper() or letter in "mw" else 0.61 for letter in text)
