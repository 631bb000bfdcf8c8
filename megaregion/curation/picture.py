"""One image of the input: read once, upright, in RGB, or refused with the reason; regions and words in it.

What stages hand on about each image is one JSON object a line, in the order of the images.

Shapes: h x w pixels; R and S boxes, [R, 4], as x0, y0, x1, y1 in pixels.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from megaregion.data.image import is_plain, open_any, to_rgb
from megaregion.data.sample import RLE, BadSample, Box

Boxes = NDArray[np.float64]
"""[R, 4]"""
Pixels = NDArray[np.uint8]
"""RGB, uint8 [h, w, 3]."""
ENDINGS = (
    ".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k",
    ".jp2", ".tif", ".tiff",
)  # fmt: skip
"""Files that are taken for images, in lower or upper case; what they are is told by their content."""
OTHER_FORMATS = (
    ".cr2", ".dng", ".exr", ".hdr", ".ico", ".jxl", ".nef", ".pgm", ".ppm", ".psd", ".svg", ".tga",
)  # fmt: skip
"""Images that are not read, but counted by their ending."""
NO_IMAGES = (
    ".csv", ".htm", ".html", ".json", ".jsonl", ".log", ".md", ".npy", ".parquet", ".py", ".txt", ".xml",
    ".yaml", ".yml",
)  # fmt: skip
"""Files that are no images whatever they hold; others are known by their first bytes."""
FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  ")
"""How an image of any name begins; WebP, AVIF and HEIC say it some bytes later."""
ORIENTATION = 0x0112
"""EXIF tag of how the camera was held; 1 is upright."""
MAX_ASPECT = 20
"""Greatest ratio of an image's edges; no crop makes sense of a longer strip, and OCR engines fail on it."""
JPEG_QUALITY = 95
"""Quality of images that have to be encoded anew."""
ROOM = 512 * 2**20
"""Bytes of decoded pixels that a process keeps for a later stage."""


class BadImage(ValueError):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """One decoded image."""

    pixels: Pixels
    """[0, 0, 3] where only the JPEG was asked for, and the file is one."""
    jpeg: bytes | None
    """The file's own bytes if they are an upright JPEG of these pixels; else None."""
    orientation: int = 1
    """How the file's pixels were turned to these, as EXIF numbers it; 1 is not at all."""
    several: bool = False
    """Whether the file holds further frames or pages; the first one counts."""

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


class Kept:
    """Pictures of one piece's images that a later stage will ask for; what does not fit is decoded again."""

    def __init__(self) -> None:
        self._pictures: dict[str, Picture] = {}
        self._piece, self._again, self._room = -1, False, 0

    def turn_to(self, piece: int, again: bool) -> None:
        """A stage begins with a piece of this number; ``again`` says whether a later one will follow."""
        if piece != self._piece:
            self._pictures.clear()
            self._room = ROOM
        self._piece, self._again = piece, again

    def picture(self, path: str, read: Callable[[], Picture]) -> Picture:
        """The picture of an image, read if it is not kept."""
        found = self._pictures.pop(path, None)
        self._room += 0 if found is None else found.pixels.nbytes
        found = found or read()
        if self._again and found.pixels.nbytes <= self._room:
            self._pictures[path] = found
            self._room -= found.pixels.nbytes
        return found


def read_picture(content: bytes, max_pixels: int, min_side: int = 1, decode: bool = True) -> Picture:
    """Decode a file; one of more pixels is refused before that, one with a shorter edge likewise.

    Without ``decode``, no more is done than :meth:`Picture.encode` needs.
    Raises BadImage where it is no image, truncated, damaged, too large, too small or too elongated.
    """
    if not content:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            # Our own limit, below, decides; Pillow's refusal beyond twice its limit still stands.
            warnings.simplefilter("ignore")
            image = open_any(content)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage("decompression bomb")
            if min(width, height) < min_side:
                raise BadImage("image too small")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise BadImage("image too elongated")
            orientation = int(image.getexif().get(ORIENTATION, 1))
            kept = image.format == "JPEG" and orientation == 1 and is_plain(image)
            frames = _several(image)
            needed = decode or not kept
            upright = to_rgb(ImageOps.exif_transpose(image)) if needed else Image.new("RGB", (0, 0))
            pixels = np.asarray(upright)
            return Picture(pixels, content if kept else None, orientation, frames)
    except BadImage:
        raise
    except BadSample as missing:
        raise BadImage(str(missing)) from None
    except Image.DecompressionBombError:
        raise BadImage("decompression bomb") from None
    except UnidentifiedImageError:
        raise BadImage("not an image") from None
    # Decoders raise nearly anything (struct.error, SyntaxError, KeyError ...) on a damaged file.
    except Exception:
        raise BadImage("truncated or damaged") from None


def begins_like_an_image(start: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of an image that is read, whatever its name."""
    return (
        start.startswith(FIRST_BYTES)
        or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:] in (b"avif", b"heic", b"heix", b"mif1"))
    )


def checksum(content: bytes) -> int:
    """Sum of the 64-bit words: it tells damage as a CRC does, in a tenth of the time."""
    words = np.frombuffer(content, "<u8", len(content) // 8)
    return (int(words.sum()) + int.from_bytes(content[8 * len(words) :], "little")) % 2**64


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


def _several(image: Image.Image) -> bool:
    # Cameras put a preview or a map of depths behind the picture, in what Pillow calls an MPO.
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


@dataclass(frozen=True)
class Proposal:
    """A region that may hold an object."""

    box: Box
    """x0, y0, x1, y1 in pixels of the image; x1 and y1 exclusive."""
    score: float
    """How sure the proposer is, 0..1; 1 where it does not say."""
    mask: RLE | None = None
    """The region's exact shape at the image's size, where the proposer knows it."""
    source_class: str = ""
    """Its class by the annotation that it comes from."""


@dataclass(frozen=True)
class Word:
    """A line of text that was recognised; engines split at gaps, so it is most often one word."""

    text: str
    """As it was read; case and punctuation stay."""
    box: Box
    """x0, y0, x1, y1 in pixels of the image; the upright box around the line, whatever its angle."""
    score: float
    """Confidence of the recognition, 0..1."""
    direction: str = ""
    """How it runs where it was not read from left to right: downwards, upwards, upside down or stacked."""


def as_array(boxes: Sequence[Box]) -> Boxes:
    """Boxes as an array, [R, 4], also when there is none."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Area of each box in square pixels, [R]; zero for one that is empty or turned inside out."""
    return np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(boxes[:, 3] - boxes[:, 1], 0, None)


def intersection(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Area that each box shares with each of the others, [R, S]."""
    across, down = (
        np.minimum(boxes[:, None, side + 2], others[None, :, side + 2])
        - np.maximum(boxes[:, None, side], others[None, :, side])
        for side in (0, 1)
    )
    return np.maximum(across, 0) * np.maximum(down, 0)


def iou(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each box with each of the others, [R, S]."""
    shared = intersection(boxes, others)
    union = area(boxes)[:, None] + area(others)[None] - shared
    return shared / np.maximum(union, 1e-9)


# What stages hand on


@dataclass(frozen=True)
class ImageRegions:
    """An image and the regions found in it, candidates or chosen ones."""

    key: str
    width: int = 0
    """0 if the image could not be used."""
    height: int = 0
    regions: Sequence[Proposal] = field(default_factory=tuple)
    checksum: int | None = None
    """Of the JPEG in a larger file that is packed as it is; other files have a hash, or are decoded."""


@dataclass(frozen=True)
class ImageWords:
    """An image and the words read in it."""

    key: str
    words: Sequence[Word] = field(default_factory=tuple)

    def above(self, confidence: float) -> list[Word]:
        """Words that were recognised with more than this confidence."""
        return [word for word in self.words if word.score > confidence]


def write_regions(file: BinaryIO, image: ImageRegions) -> None:
    """Append one image."""
    regions = [_from_region(region) for region in image.regions]
    line = {"key": image.key, "width": image.width, "height": image.height, "regions": regions}
    _write(file, line | ({} if image.checksum is None else {"checksum": image.checksum}))


def read_regions(paths: Iterable[Path]) -> Iterator[ImageRegions]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        regions = [*map(_to_region, line["regions"])]
        yield ImageRegions(line["key"], line["width"], line["height"], regions, line.get("checksum"))


def write_words(file: BinaryIO, image: ImageWords) -> None:
    """Append one image."""
    words = [
        {
            "text": w.text, "box": _rounded(w.box), "score": round(w.score, 4),
            **({"direction": w.direction} if w.direction else {}),
        }
        for w in image.words
    ]  # fmt: skip
    _write(file, {"key": image.key, "words": words})


def read_words(paths: Iterable[Path]) -> Iterator[ImageWords]:
    """Read the images of several pieces, one after the other."""
    for line in _lines(paths):
        words = [Word(w["text"], tuple(w["box"]), w["score"], w.get("direction", "")) for w in line["words"]]
        yield ImageWords(line["key"], words)


def _write(file: BinaryIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n")


def _lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        # Bytes, not text lines: a word may hold one of Unicode's other line ends.
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)


def _from_region(region: Proposal) -> dict[str, Any]:
    line: dict[str, Any] = {"box": _rounded(region.box), "score": round(region.score, 4)}
    if region.mask is not None:
        line["mask"] = {"size": region.mask.size, "counts": region.mask.counts}
    if region.source_class:
        line["class"] = region.source_class
    return line


def _to_region(line: dict[str, Any]) -> Proposal:
    mask = line.get("mask")
    rle = None if mask is None else RLE(tuple(mask["size"]), tuple(mask["counts"]))
    return Proposal(tuple(line["box"]), line["score"], rle, line.get("class", ""))


def _rounded(box: Box) -> list[float]:
    """Hundredths of a pixel are enough, and keep the files small."""
    return [round(value, 2) for value in box]
