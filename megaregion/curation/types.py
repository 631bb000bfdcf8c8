"""What engines take and give: pixels, regions, words, embeddings.

Shapes: n crops, C channels, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.boxes import Box
from megaregion.data.sample import RLE

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
        ...


class Embedder(Protocol):
    """Maps crops of any size to unit vectors."""

    @property
    def dim(self) -> int:
        """Channels C of an embedding."""
        ...

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops.

        Args:
            crops: RGB, uint8 [h, w, 3], of any sizes.

        Returns:
            Unit vectors, float32 [n, C]; a crop's vector does not depend on the others.
        """
        ...


class Reader(Protocol):
    """Finds and reads text in one image."""

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, RGB uint8 [h, w, 3]; nothing is filtered by confidence."""
        ...


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1, [n, C]; a row of zeros stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


def to_words(
    polygons: Iterable[Any], texts: Iterable[str], scores: Iterable[float], image: Pixels
) -> list[Word]:
    """Bring an engine's output into one form.

    Args:
        polygons: Corners of each line in pixels, each [4, 2].
        texts: What each line reads; blank lines are left out.
        scores: Confidence of each line.
        image: The image that was read; boxes are clipped to it, and dropped where nothing is left.
    """
    height, width = image.shape[:2]
    words = []
    for polygon, text, score in zip(polygons, texts, scores, strict=True):
        corners = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        x0, y0 = np.clip(corners.min(axis=0), 0, (width, height)).tolist()
        x1, y1 = np.clip(corners.max(axis=0), 0, (width, height)).tolist()
        if text.strip() and x1 > x0 and y1 > y0 and np.isfinite(score):
            words.append(Word(text.strip(), (x0, y0, x1, y1), float(score)))
    return words
