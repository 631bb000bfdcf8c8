"""What engines take and give: pixels, boxes, regions, words, embeddings.

Shapes: n crops, C channels, h x w pixels; R and S boxes, [R, 4], as x0, y0, x1, y1 in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megaregion.data.sample import RLE, Box

Boxes = NDArray[np.float64]
"""[R, 4]"""

Pixels = NDArray[np.uint8]
"""RGB, uint8 [h, w, 3]."""


@dataclass(frozen=True)
class Proposal:
    """A region that may hold an object."""

    box: Box
    """x0, y0, x1, y1 in pixels of the image; x1 and y1 exclusive."""
    score: float
    """How sure the proposer is, 0..1; 1 where it does not say."""
    mask: RLE | None = None
    """The region's exact shape at the image's size, where the proposer knows it."""


@dataclass(frozen=True)
class Word:
    """A line of text that was recognised; engines split at gaps, so it is most often one word."""

    text: str
    """As it was read; case and punctuation stay."""
    box: Box
    """x0, y0, x1, y1 in pixels of the image; the upright box around the line, whatever its angle."""
    score: float
    """Confidence of the recognition, 0..1."""


class Proposer(Protocol):
    """Finds regions in one image."""

    def propose(self, image: Pixels) -> list[Proposal]:
        """Propose regions of an image, RGB uint8 [h, w, 3]."""


class Embedder(Protocol):
    """Maps crops of any size to unit vectors."""

    @property
    def dim(self) -> int:
        """Channels C of an embedding."""

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops.

        Args:
            crops: RGB, uint8 [h, w, 3], of any sizes.

        Returns:
            Unit vectors, float32 [n, C]; a crop's vector does not depend on the others.
        """


class Reader(Protocol):
    """Finds and reads text in one image."""

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, RGB uint8 [h, w, 3]; nothing is filtered by confidence."""


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1, [n, C]; a row of zeros stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def as_array(boxes: Sequence[Box]) -> Boxes:
    """Boxes as an array, [R, 4], also when there is none."""
    return np.asarray(boxes, dtype=np.float64).reshape(-1, 4)


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Area of each box in square pixels, [R]; zero for one that is empty or turned inside out."""
    return np.clip(boxes[:, 2] - boxes[:, 0], 0, None) * np.clip(boxes[:, 3] - boxes[:, 1], 0, None)


def intersection(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Area that each box shares with each of the others, [R, S]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def iou(boxes: Boxes, others: Boxes) -> NDArray[np.float64]:
    """Intersection over union of each box with each of the others, [R, S]."""
    shared = intersection(boxes, others)
    union = area(boxes)[:, None] + area(others)[None] - shared
    return shared / np.maximum(union, 1e-9)
