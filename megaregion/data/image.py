"""Encoded images: opened with suspicion, decoded no larger than needed.

Whatever a damaged or hostile file provokes in the decoder becomes a :class:`BadSample`. Rotation notes
(EXIF) are ignored: boxes are in pixels as stored.

A JPEG is decoded by libjpeg-turbo at N eighths of its size, by a smaller inverse DCT of each block, where
that still gives the view as many pixels as are wanted; what is left is a scaling by less than two. Both
steps are whole-number arithmetic, the same on every machine. All else goes through Pillow.
"""

from __future__ import annotations

import io
import threading
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from megaregion.data.sample import BadSample
from megaregion.data.view import View

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that are tried; the fewer, the less a hostile file can reach."""
LINEAR_UP_TO = 1.5
"""Greatest reduction by linear interpolation, which reads two pixels a side; beyond it detail would turn into
false patterns, and Pillow's antialiased bicubic filter takes over."""

Pixels = NDArray[np.uint8]


class _Scratch(threading.local):
    """Memory for one decoded image; a new piece each time would cost a page fault for every 4 KB."""

    memory = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> Pixels:
        """At least `size` bytes, which the next call gives out again."""
        if self.memory.size < size:
            self.memory = np.empty(size, dtype=np.uint8)
        return self.memory


_SCRATCH = _Scratch()


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header has been read; any cut decodes it anew."""

    content: bytes
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as Pillow's images have it."""
        return self.width, self.height


def open_image(content: bytes) -> Image.Image | Jpeg:
    """Read the header of an encoded image; its pixels are decoded on demand.

    Raises:
        BadSample: It is no image, or one of more than PIL's MAX_IMAGE_PIXELS (a decompression bomb).
    """
    if content[:2] == b"\xff\xd8" and (jpeg := _read_header(content)) is not None:
        return jpeg
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


def decode_image(content: bytes) -> Image.Image:
    """Decode a whole image as it is stored, RGB.

    Raises:
        BadSample: As :func:`open_image`, or it is truncated or damaged.
    """
    pixels, _ = _decode(open_image(content), eighths=8)
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def cut(image: Image.Image | Jpeg, view: View, width: int, height: int, shrink: bool = False) -> Pixels:
    """Decode a view of an image at a given size; decoding, crop and scaling are one step.

    Args:
        image: An image whose pixels may not have been decoded yet; it stays as it is.
        view: The part to take, in pixels of the stored image.
        width: Columns of the result.
        height: Rows of the result.
        shrink: Take the fast way for a JPEG: decode it no larger than needed and interpolate linearly. The
            result differs from that of the full picture and the antialiased filter by a few levels of 255.

    Returns:
        RGB, uint8 [height, width, 3].

    Raises:
        BadSample: The image is truncated or damaged.
    """
    eighths = eighths_needed(view, width, height) if shrink and isinstance(image, Jpeg) else 8
    pixels, eighths = _decode(image, eighths)
    scale = eighths / 8
    box = (view.x0 * scale, view.y0 * scale, view.x1 * scale, view.y1 * scale)
    reduction = ((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    linear = shrink and min(reduction) >= 1 and max(reduction) <= LINEAR_UP_TO
    # OpenCV crops at whole pixels only.
    if linear and isinstance(pixels, np.ndarray) and all(edge == int(edge) for edge in box):
        x0, y0, x1, y1 = (int(edge) for edge in box)
        result = cv2.resize(pixels[y0:y1, x0:x1], (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    else:
        picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        result = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
    # OpenCV's mirror is twenty times as fast as a copy of numpy's reversed view.
    return cv2.flip(result, 1) if view.flipped else result


def eighths_needed(view: View, width: int, height: int) -> int:
    """Choose at how many eighths of its size a JPEG is decoded for a view of width x height pixels.

    Returns:
        The least N of 1 to 8 that leaves the view enough pixels; 8 also where linear interpolation may do
        the rest, for blocks of 5 to 7 pixels have no vector code and cost more than whole ones.
    """
    columns, rows = view.x1 - view.x0, view.y1 - view.y0
    if max(columns / width, rows / height) <= LINEAR_UP_TO:
        return 8
    return next((n for n in range(1, 8) if columns * n >= 8 * width and rows * n >= 8 * height), 8)


def stay_on_one_core() -> None:
    """Keep OpenCV from threads of its own, which do not survive a fork and crowd the workers' cores."""
    cv2.setNumThreads(0)


def _read_header(content: bytes) -> Jpeg | None:
    """Read what simplejpeg can decode; None leaves the image, and what is wrong with it, to Pillow."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colors not in ("YCbCr", "RGB", "Gray") or width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
        return None
    return Jpeg(content, width, height)


def _decode(image: Image.Image | Jpeg, eighths: int) -> tuple[Pixels | Image.Image, int]:
    """Decode to RGB; returns the pixels and the number of eighths at which they came out."""
    if isinstance(image, Jpeg):
        width, height = (-(-edge * eighths // 8) for edge in image.size)
        try:
            pixels = simplejpeg.decode_jpeg(
                image.content,
                "RGB",
                min_width=width,
                min_height=height,
                buffer=_SCRATCH.of(3 * width * height),
            )
        except ValueError:
            # It is strict, and much of what it refuses (stray bytes between markers) is a good picture.
            return _decode_by_pillow(image.content), 8
        if pixels.shape[:2] == (height, width):
            return pixels, eighths
        return _decode_by_pillow(image.content), 8
    try:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB"), 8
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None


def _decode_by_pillow(content: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None
