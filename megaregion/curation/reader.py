"""Reading text: words with their boxes and confidence, from one of two OCR engines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaregion.curation.picture import Pixels
from megaregion.curation.proposer import Box
from megaregion.curation.settings import OcrSettings


@dataclass(frozen=True)
class Word:
    """A line of text that was recognised; engines split at gaps, so it is most often one word."""

    text: str
    """As it was read; case and punctuation stay."""
    box: Box
    """x0, y0, x1, y1 in pixels of the image; the upright box around the line, whatever its angle."""
    score: float
    """Confidence of the recognition, 0..1."""


class Reader(Protocol):
    """Finds and reads text in one image."""

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, RGB uint8 [h, w, 3]; nothing is filtered by confidence."""
        ...


class NoReader:
    """Reads nothing, for data sets that are wanted without text."""

    def read(self, image: Pixels) -> list[Word]:
        """No words."""
        return []


def load_reader(settings: OcrSettings) -> Reader:
    """The reader that the settings name.

    Raises:
        UserError: The engine is not installed or its models are missing.
    """
    if settings.ocr == "none":
        return NoReader()
    if settings.ocr == "paddleocr":
        from megaregion.curation.paddle import PaddleReader

        return PaddleReader(Path(settings.paddle))
    from megaregion.curation.rapid import RapidReader

    return RapidReader(settings.ocr_side)


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
