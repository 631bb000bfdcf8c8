"""One image of the input: read once, upright, in RGB, or refused with the reason.

Shapes: h x w pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megaregion.curation.types import Pixels
from megaregion.data.image import FORMATS, to_rgb

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif")
"""Files that are taken for images, in lower or upper case."""
OTHER_FORMATS = (
    ".avif", ".bmp", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".nef",
    ".pgm", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff",
)  # fmt: skip
"""Images that are not read, but counted by their ending."""
ORIENTATION = 0x0112
"""EXIF tag of how the camera was held; 1 is upright."""
MAX_ASPECT = 20
"""Greatest ratio of an image's edges; no crop makes sense of a longer strip, and OCR engines fail on it."""
JPEG_QUALITY = 95
"""Quality of images that have to be encoded anew."""


class BadImage(ValueError):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """One decoded image."""

    pixels: Pixels
    jpeg: bytes | None
    """The file's own bytes if they are an upright JPEG of these pixels; else None."""
    orientation: int = 1
    """How the file's pixels were turned to these, as EXIF numbers it; 1 is not at all."""

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return self.pixels.shape[1]

    def encode(self) -> bytes:
        """The image as an upright JPEG, untouched where the file already is one."""
        if self.jpeg is not None:
            return self.jpeg
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


def read_picture(content: bytes, max_pixels: int, min_side: int = 1) -> Picture:
    """Decode an image.

    Args:
        content: The file.
        max_pixels: Larger images are refused before they are decoded.
        min_side: Images whose shortest edge is less, in pixels, are refused.

    Raises:
        BadImage: It is no image, truncated, damaged, too large, too small or too elongated.
    """
    if not content:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            # Our own limit, below, decides; Pillow's refusal beyond twice its limit still stands.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage("decompression bomb")
            if min(width, height) < min_side:
                raise BadImage("image too small")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImage("image too elongated")
            orientation = int(image.getexif().get(ORIENTATION, 1))
            kept = image.format == "JPEG" and orientation == 1
            return Picture(_upright(image), content if kept else None, orientation)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("decompression bomb") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    # Decoders raise nearly anything (struct.error, SyntaxError, KeyError ...) on a damaged file.
    except Exception:
        raise BadImage("truncated or damaged") from None


def resize(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale an image to a size: by area where it shrinks, linearly where it grows."""
    shrinks = pixels.shape[0] * pixels.shape[1] > width * height
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Any = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method)
    return resized


def crop(pixels: Pixels, box: tuple[float, float, float, float]) -> Pixels:
    """The part of an image inside a box, widened to whole pixels, at least one."""
    height, width = pixels.shape[:2]
    x0, y0 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    x1, y1 = min(max(int(np.ceil(box[2])), x0 + 1), width), min(max(int(np.ceil(box[3])), y0 + 1), height)
    return pixels[y0:y1, x0:x1]


def _upright(image: Image.Image) -> Pixels:
    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data and not upright.mode.startswith("I"):
        # Whatever colour hides under transparent pixels was never meant to be seen.
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.asarray(to_rgb(upright))
