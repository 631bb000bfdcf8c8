"""Encoded images and crops of them: opened with suspicion, decoded no larger than needed.

Curation and training read the same pixels: whatever a file stores (16 bits, floats, ink, a palette, a wide
gamut) becomes sRGB here, over white where it is transparent. Whatever a damaged or hostile file provokes in
the decoder becomes a :class:`BadSample`. Rotation notes (EXIF) are ignored: boxes are in pixels as stored.

A JPEG is decoded by libjpeg-turbo at N eighths of its size, by a smaller inverse DCT of each block, where
that still gives the crop as many pixels as are wanted; what is left is a scaling by less than two. Both
steps are whole-number arithmetic, the same on every machine. All else goes through Pillow.

Shapes: R regions. Boxes are x0, y0, x1, y1 in pixels of the stored image, [R, 4].
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from megaregion.data.sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000")
"""Decoders that are tried, and HEIC's where its package is installed; the fewer, the less a hostile file can
reach."""
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""What stands in a HEIC file after its length and ``ftyp``."""
COLOR_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Pillow's mode for what a color profile (ICC) describes."""
SEEN = 8
"""Levels of 255 by which a color profile must change some color to matter: all that call themselves sRGB, and
grey of gamma 2.2, differ by less."""
BRIGHTEST = 99.5
"""Percentile of an image's values that becomes white where they go beyond 1: highlights may be far above."""
LINEAR_UP_TO = 1.5
"""Greatest reduction by linear interpolation, which reads two pixels a side; beyond it detail would turn into
false patterns, and Pillow's antialiased bicubic filter takes over."""
JPEG_FRAMES = (0xC0, 0xC1, 0xC2, 0xDA)
"""Markers at which the head of a JPEG is over."""
JPEG_BLOCK = 8
"""Side of a JPEG's blocks, in pixels."""
CROP_TRIES = 10
"""Random sizes and shapes of a crop before the largest allowed crop in the middle is taken."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """A rectangle of the stored image, in pixels, that is stretched to the model's input."""

    x0: float
    y0: float
    x1: float
    y1: float
    flipped: bool = False
    """Whether left and right change places."""

    def edges(self, rows: int, columns: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Borders of the columns, [columns + 1], and rows, [rows + 1], of a grid over the crop.

        They are in pixels of the stored image and before the mirror.
        """
        # As linspace does, which takes ten times as long for the few numbers of a patch grid.
        x_edges = self.x0 + np.arange(columns + 1, dtype=np.float64) * ((self.x1 - self.x0) / columns)
        y_edges = self.y0 + np.arange(rows + 1, dtype=np.float64) * ((self.y1 - self.y0) / rows)
        x_edges[-1], y_edges[-1] = self.x1, self.y1
        return x_edges, y_edges

    def on_blocks(self, width: int, height: int) -> Crop:
        """Move each border to the nearest one of a JPEG's blocks, by at most 4 pixels, 7 at an image's end.

        Decoded at any number of eighths of its size, an image of width x height pixels then still has the
        crop on whole pixels.
        """

        def near(edge: float, length: int) -> float:
            return min(round(edge / JPEG_BLOCK), length // JPEG_BLOCK) * JPEG_BLOCK

        x0, x1 = near(self.x0, width), near(self.x1, width)
        y0, y1 = near(self.y0, height), near(self.y1, height)
        return Crop(x0, y0, x1, y1, self.flipped)

    def share_inside(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of each box's area that lies inside the crop, [R]; 0 for a box without area."""
        x0, y0, x1, y1 = boxes.T
        wide = np.minimum(x1, self.x1) - np.maximum(x0, self.x0)
        high = np.minimum(y1, self.y1) - np.maximum(y0, self.y0)
        inside = np.maximum(wide, 0.0) * np.maximum(high, 0.0)
        area = np.maximum(x1 - x0, 0.0) * np.maximum(y1 - y0, 0.0)
        return np.divide(inside, area, out=np.zeros_like(area), where=area > 0)


def random_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flipped: bool = False,
) -> Crop:
    """A random resized crop on whole pixels.

    Args:
        rng: Generator of this sample.
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height; drawn evenly on a logarithmic scale.
        flipped: Whether the crop is mirrored.
    """
    for _ in range(CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return Crop(x0, y0, x0 + w, y0 + h, flipped)
    # None of them fits a very long image: take as much of its middle as the ratio allows.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    x0, y0 = (width - w) // 2, (height - h) // 2
    return Crop(x0, y0, x0 + w, y0 + h, flipped)


def fitting_grid(crop: Crop, most: int) -> tuple[int, int]:
    """Rows and columns of patches for a crop: about its aspect ratio, and nearly as many as `most`."""
    shape = (crop.y1 - crop.y0) / (crop.x1 - crop.x0)
    tall = min(float(most), max(1.0, math.sqrt(most * shape)))
    grids = [
        (rows, columns)
        for rows in (math.floor(tall), math.ceil(tall))
        for columns in (math.floor(most / tall), math.ceil(most / tall), most // rows)
        if 0 < rows * columns <= most
    ]

    def cost(grid: tuple[int, int]) -> float:
        # Rounding stretches the image by some percent; leaving patches unused costs resolution.
        rows, columns = grid
        return abs(math.log(rows / columns / shape)) + math.log(most / (rows * columns))

    return min(grids, key=cost)


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header has been read; each crop decodes it anew."""

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
            return open_any(content)
    except BadSample:
        raise
    except UnidentifiedImageError:
        # Its text is an address in memory.
        raise BadSample(f"image cannot be opened (no {', '.join(FORMATS)} file)") from None
    # Decoders raise nearly anything (struct.error, SyntaxError, KeyError ...) on a damaged file.
    except Exception as error:
        raise BadSample(f"image cannot be opened ({type(error).__name__}: {error})") from None


def open_any(content: bytes) -> Image.Image:
    """Read the header of an encoded image of any kind by Pillow, for :func:`to_rgb`.

    Raises:
        BadSample: It needs a package that is not installed.
        Exception: Anything, for it is damaged or hostile; UnidentifiedImageError where it is no image.
    """
    formats: tuple[str, ...] = FORMATS
    if content[4:8] == b"ftyp" and content[8:12] in HEIC_BRANDS and b"avif" not in content[12:64]:
        _learn_heic()
        formats = ("HEIF", *FORMATS)
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except UnidentifiedImageError:
        floats = _open_floats(content)
        if floats is None:
            raise
        return floats
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Adobe stores ink as 255 - ink and leaves its mark; Pillow takes every file for one of Adobe's.
        image.tile = [tile._replace(args=("CMYK", "")) for tile in image.tile]
    if not all(image.size):
        raise UnidentifiedImageError("an image without pixels")
    return image


def decode_image(content: bytes) -> Image.Image:
    """Decode a whole image as it is stored, RGB.

    Raises:
        BadSample: As :func:`open_image`, or it is truncated or damaged.
    """
    pixels, _ = _decode(open_image(content), eighths=8)
    return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels


def to_rgb(image: Image.Image) -> Image.Image:
    """An image, decoded, as sRGB: what is transparent lies over white, and a profile that matters is applied.

    16-bit grey, which Pillow cuts off at 255, keeps its upper eight bits; other numbers are scaled.
    """
    image.load()  # Its file may be closed when the pixels are asked for.
    profile = image.info.get("icc_profile") or b""
    if image.mode[0] in "IF":
        image = Image.fromarray(_levels(np.asarray(image)))
    elif image.has_transparency_data:
        # Whatever colour hides under transparent pixels was never meant to be seen.
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    if image.mode not in COLOR_SPACES.values():
        image = image.convert("RGB")
    if profile and (transform := _to_srgb(profile, image.mode)) is not None:
        return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def is_plain(image: Image.Image) -> bool:
    """Whether a stored image is grey or RGB of eight bits that needs no color profile."""
    profile = image.info.get("icc_profile") or b""
    return image.mode in ("L", "RGB") and not (profile and _to_srgb(profile, image.mode))


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns pixels of a color profile into sRGB; None where nothing would be seen, or it is damaged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if COLOR_SPACES.get(source.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    colors = np.stack(np.meshgrid(*[steps] * len(mode)), axis=-1)
    probe = Image.frombytes(mode, (len(steps), len(steps) ** (len(mode) - 1)), colors.tobytes())
    change = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert("RGB"), int)
    return transform if np.abs(change).max() > SEEN else None


def _levels(values: NDArray[Any]) -> Pixels:
    """Numbers of another range as 0..255.

    Whole ones are of 16 bits, and floats reach from 0 to 1; where they are greater, the image's own brightest
    values decide.
    """
    if values.dtype.kind in "iu" and values.max() <= 0xFFFF:
        return (values.clip(0, 0xFFFF) >> 8).astype(np.uint8)
    values = values.astype(np.float32)
    finite = values[np.isfinite(values)]
    white = max(1.0, float(np.percentile(finite, BRIGHTEST))) if finite.max(initial=0) > 1 else 1.0
    return np.round(np.nan_to_num(values.clip(0, white)) * (255 / white)).astype(np.uint8)


def _learn_heic() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise BadSample("HEIC needs a package; pip install pillow_heif") from None
    pillow_heif.register_heif_opener()


def _open_floats(content: bytes) -> Image.Image | None:
    """A TIFF of three or four floats a pixel, which Pillow does not know, decoded; None if it is none."""
    if content[:4] not in (b"II*\0", b"MM\0*"):
        return None
    file = io.BytesIO(content)
    header = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(header.next)
    header.load(file)
    width, height = (header.get(tag, 0) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    if set(header.get(TiffImagePlugin.SAMPLEFORMAT, ())) != {3}:
        return None
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError(f"{width} x {height} pixels")
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3:
        return None
    return Image.fromarray(_levels(pixels[..., 2::-1]))


def decode_crop(
    image: Image.Image | Jpeg, crop: Crop, width: int, height: int, shrink: bool = False
) -> Pixels:
    """Decode a crop of an image at a given size; decoding, cropping and scaling are one step.

    Args:
        image: An image whose pixels may not have been decoded yet; it stays as it is.
        crop: The part to take.
        width: Columns of the result.
        height: Rows of the result.
        shrink: Take the fast way for a JPEG: decode it no larger than needed and interpolate linearly. The
            result differs from that of the full picture and the antialiased filter by a few levels of 255.

    Returns:
        RGB, uint8 [height, width, 3].

    Raises:
        BadSample: The image is truncated or damaged.
    """
    eighths = eighths_needed(crop, width, height) if shrink and isinstance(image, Jpeg) else 8
    pixels, eighths = _decode(image, eighths)
    scale = eighths / 8
    box = (crop.x0 * scale, crop.y0 * scale, crop.x1 * scale, crop.y1 * scale)
    reduction = ((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    linear = shrink and min(reduction) >= 1 and max(reduction) <= LINEAR_UP_TO
    # OpenCV crops at whole pixels only.
    if linear and isinstance(pixels, np.ndarray) and all(edge == int(edge) for edge in box):
        x0, y0, x1, y1 = (int(edge) for edge in box)
        result = cv2.resize(pixels[y0:y1, x0:x1], (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    else:
        picture = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        result = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
    # OpenCV's mirror is twenty times as fast as a copy of numpy's reversed array.
    return cv2.flip(result, 1) if crop.flipped else result


def eighths_needed(crop: Crop, width: int, height: int) -> int:
    """Choose at how many eighths of its size a JPEG is decoded for a crop of width x height pixels.

    Returns:
        The least N of 1 to 8 that leaves the crop enough pixels; 8 also where linear interpolation may do
        the rest, for blocks of 5 to 7 pixels have no vector code and cost more than whole ones.
    """
    columns, rows = crop.x1 - crop.x0, crop.y1 - crop.y0
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
    if (profile := _profile(content)) and _to_srgb(profile, "L" if colors == "Gray" else "RGB") is not None:
        return None
    return Jpeg(content, width, height)


def _profile(content: bytes) -> bytes:
    """The color profile that stands before a JPEG's frame, or nothing; Pillow takes far longer."""
    parts, place = [], 2
    with contextlib.suppress(IndexError):
        while content[place] == 0xFF and (kind := content[place + 1]) not in JPEG_FRAMES:
            end = place + 2 + (content[place + 2] << 8 | content[place + 3])
            if kind == 0xE2 and content.startswith(b"ICC_PROFILE\0", place + 4):
                parts.append(content[place + 16 : end])
            place = end
    # Each begins with its number and their number.
    return b"".join(part[2:] for part in sorted(parts)) if parts else b""


class _Scratch(threading.local):
    """Memory for one decoded image; a new piece each time would cost a page fault for every 4 KB."""

    memory = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> Pixels:
        """At least `size` bytes, which the next call gives out again."""
        if self.memory.size < size:
            self.memory = np.empty(size, dtype=np.uint8)
        return self.memory


_SCRATCH = _Scratch()


def _decode(image: Image.Image | Jpeg, eighths: int) -> tuple[Pixels | Image.Image, int]:
    """Decode to RGB; returns the pixels and the number of eighths at which they came out."""
    if not isinstance(image, Jpeg):
        return _decode_by_pillow(image), 8
    width, height = (-(-edge * eighths // 8) for edge in image.size)
    try:
        pixels = simplejpeg.decode_jpeg(
            image.content, "RGB", min_width=width, min_height=height, buffer=_SCRATCH.of(3 * width * height)
        )
        if pixels.shape[:2] == (height, width):
            return pixels, eighths
    except ValueError:
        # It is strict, and much of what it refuses (stray bytes between markers) is a good picture.
        pass
    return np.asarray(_decode_by_pillow(image)), 8


def _decode_by_pillow(image: Image.Image | Jpeg) -> Image.Image:
    try:
        if isinstance(image, Jpeg):
            image = open_any(image.content)
        return to_rgb(image)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample(f"image cannot be decoded ({type(error).__name__}: {error})") from None
