"""Encoded images: opened with suspicion, decoded no larger than needed.

Whatever a damaged or hostile file provokes in the decoder becomes a :class:`BadSample`. Rotation notes
(EXIF) are ignored: boxes are in pixels as stored.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
    # Decoders raise nearly anything (struct.error, SyntaxError, KeyError ...) on a damaged file.
    except Exception as error:
        raise BadSample(f"image cannot be opened ({type(error).__name__}: {error})") from None


def cut(image: Image.Image, view: View, width: int, height: int) -> NDArray[np.uint8]:
    """Decode a view of an image at a given size.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is still enough; the crop and the
    rest of the scaling are one step.

    Args:
        image: An image whose pixels may not have been decoded yet; it cannot be reused afterwards.
        view: The part to take, in pixels of the stored image.
        width: Columns of the result.
        height: Rows of the result.

    Returns:
        RGB, uint8 [height, width, 3].

    Raises:
        BadSample: The image is truncated or damaged.
    """
    enough = (
        max(width, int(image.width * width / (view.x1 - view.x0))),
        max(height, int(image.height * height / (view.y1 - view.y0))),
    )
    scale_x = scale_y = 1.0
    try:
        full_width, full_height = image.size
        drafted = image.draft("RGB", enough)
        if drafted is not None:
            scale_x, scale_y = drafted[1][2] / full_width, drafted[1][3] / full_height
        image.load()
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None
    box = (view.x0 * scale_x, view.y0 * scale_y, view.x1 * scale_x, view.y1 * scale_y)
    small = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(small)
    return pixels[:, ::-1] if view.flipped else pixels
