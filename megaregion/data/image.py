"""Encoded images: opened with suspicion, decoded no larger than needed.

Whatever a damaged or hostile file provokes in the decoder becomes a :class:`BadSample`. Rotation notes
(EXIF) are ignored: boxes are in pixels as stored.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from megaregion.data.sample import BadSample
from megaregion.data.view import View

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that are tried; the fewer, the less a hostile file can reach."""


def open_image(content: bytes) -> Image.Image:
    """Read the header of an encoded image; its pixels are decoded on demand.

    Raises:
        BadSample: It is no image, or one of more than PIL's MAX_IMAGE_PIXELS (a decompression bomb).
    """
    try:
        with warnings.catch_warnings():
            # Up to twice the limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        # Its text is an address in memory.
        raise BadSample(f"image cannot be opened (no {', '.join(FORMATS)} file)") from None
    # Decoders raise nearly anything (struct.error, SyntaxError, KeyError ...) on a damaged file.
    except Exception as error:
        raise BadSample(f"image cannot be opened ({type(error).__name__}: {error})") from None


def cut(image: Image.Image, view: View, width: int, height: int, shrink: bool = False) -> NDArray[np.uint8]:
    """Decode a view of an image at a given size; crop and scaling are one step.

    Args:
        image: An image whose pixels may not have been decoded yet.
        view: The part to take, in pixels of the stored image.
        width: Columns of the result.
        height: Rows of the result.
        shrink: Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size where that is still enough. Much
            cheaper for large photos, but the image then stays small: it must not be used again.

    Returns:
        RGB, uint8 [height, width, 3].

    Raises:
        BadSample: The image is truncated or damaged.
    """
    scale_x = scale_y = 1.0
    try:
        if shrink:
            scale_x, scale_y = _shrink(image, view, width, height)
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None
    box = (view.x0 * scale_x, view.y0 * scale_y, view.x1 * scale_x, view.y1 * scale_y)
    pixels = np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC, box=box))
    return pixels[:, ::-1] if view.flipped else pixels


def _shrink(image: Image.Image, view: View, width: int, height: int) -> tuple[float, float]:
    """Choose the decoder's scale so that the view still has width x height pixels; returns the scale."""
    full_width, full_height = image.size
    enough = (
        math.ceil(full_width * width / (view.x1 - view.x0)),
        math.ceil(full_height * height / (view.y1 - view.y0)),
    )
    drafted = image.draft("RGB", enough)
    if drafted is None:
        return 1.0, 1.0
    _, (_, _, columns, rows) = drafted
    return columns / full_width, rows / full_height
