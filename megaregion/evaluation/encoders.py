"""What every compared encoder is to the evaluation: features of regions, of places and of whole images.

Shapes: n boxes of one image, R regions of several images one after another, B images, C feature width, E
embedding width, V text classes, h x w pixels of a crop or cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PIXELS = "pixels"
"""Name of the raw-pixel baseline's row."""
SIDE = 32
"""Side to which it resizes a crop."""

CELL = 8
"""Pixels along each side of a place of the pixels' map."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class BoxedImage:
    """One image with the regions to encode."""

    image: Image.Image
    """RGB."""
    boxes: NDArray[np.float32]
    """[n, 4] in pixels of the image, x1 and y1 exclusive."""


@dataclass(frozen=True)
class Features:
    """Features of R regions."""

    region: NDArray[np.float32]
    """[R, C], compared by cosine."""
    embedding: NDArray[np.float32] | None = None
    """[R, E], what the heads classify; None for an encoder without heads."""


class Encoder(Protocol):
    """An encoder of regions, of whole images, and perhaps of every place of an image."""

    @property
    def name(self) -> str:
        """Name in the table."""
        ...

    @property
    def text_centers(self) -> NDArray[np.float32] | None:
        """Weight of the text head, [V, E]; None without one."""
        ...

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Encode all regions of a batch of images, image by image."""
        ...

    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Encode whole images, [B, C]."""
        ...

    def maps(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]] | None:
        """Feature map of each image, stretched to a square, [h, w, C] each; None if it has none."""
        ...


class CropEncoder:
    """Encodes each region from its crop alone: pixels, or any image encoder.

    Args:
        name: Name in the table.
        embed: Crops, uint8 RGB [h, w, 3] of any sizes, to features [R, C].
        threads: Threads that embed parts of the crops at once; for an embed that computes on one core.
        see: From a whole image, uint8 RGB [h, w, 3], to its feature map; None if the encoder has none.
    """

    text_centers = None

    def __init__(
        self,
        name: str,
        embed: Callable[[Sequence[Pixels]], NDArray[np.float32]],
        threads: int = 1,
        see: Callable[[Pixels], NDArray[np.float32]] | None = None,
    ) -> None:
        self.name = name
        self._embed = embed
        self._threads = threads
        self._see = see

    def renamed(self, name: str) -> CropEncoder:
        """The same encoder under another name."""
        return CropEncoder(name, self._embed, self._threads, self._see)

    def encode(self, images: Sequence[BoxedImage]) -> Features:
        """Cut out every region and embed the crops of all images together."""
        return Features(self._embedded([np.asarray(crop(i.image, box)) for i in images for box in i.boxes]))

    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Embed whole images as if each were one crop."""
        return self._embedded([np.asarray(image) for image in images])

    def maps(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]] | None:
        """Feature map of each image, if the encoder has one."""
        if self._see is None:
            return None
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._see, [np.asarray(image) for image in images]))

    def _embedded(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        size = max(1, -(-len(crops) // self._threads))
        parts = [crops[start : start + size] for start in range(0, len(crops), size)]
        with ThreadPoolExecutor(self._threads) as pool:
            return np.concatenate(list(pool.map(self._embed, parts))).astype(np.float32, copy=False)


def crop(image: Image.Image, box: Sequence[float] | NDArray[np.float32]) -> Image.Image:
    """Cut a box out of an image, rounded to whole pixels, clipped to the image, at least one pixel."""
    x0, y0, x1, y1 = (round(float(value)) for value in box)
    left, top = min(max(x0, 0), image.width - 1), min(max(y0, 0), image.height - 1)
    return image.crop((left, top, min(max(x1, left + 1), image.width), min(max(y1, top + 1), image.height)))


def raw_pixels(crops: Sequence[Pixels]) -> NDArray[np.float32]:
    """Pixels of each crop at 32 x 32, on the 0..1 scale, as one vector, [R, 3072]."""
    side = (SIDE, SIDE)
    small = [np.asarray(Image.fromarray(c).resize(side, Image.Resampling.BILINEAR)) for c in crops]
    return np.asarray(small, np.float32).reshape(len(crops), 3 * SIDE**2) / np.float32(255)


def centred_pixels(crops: Sequence[Pixels]) -> NDArray[np.float32]:
    """The same with each crop's mean subtracted, so that brightness alone makes no two crops alike."""
    pixels = raw_pixels(crops)
    centred: NDArray[np.float32] = pixels - pixels.mean(axis=1, keepdims=True)
    return centred


def pixel_map(image: Pixels, cells: int) -> NDArray[np.float32]:
    """Pixels of each of cells x cells places at 8 x 8, on the 0..1 scale, [cells, cells, 192]."""
    side = CELL * cells
    small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR), np.float32)
    places = small.reshape(cells, CELL, cells, CELL, 3).swapaxes(1, 2) / np.float32(255)
    return places.reshape(cells, cells, -1)


def pixel_encoders(cells: int) -> list[CropEncoder]:
    """Both forms of the pixel baseline; the table shows the better of the two.

    Args:
        cells: Places along each side of their maps: the grid of the network that they are compared with.
    """
    forms = ((f"{PIXELS}/raw", raw_pixels), (f"{PIXELS}/centred", centred_pixels))
    return [CropEncoder(name, embed, see=lambda image: pixel_map(image, cells)) for name, embed in forms]
