"""The engines that find regions and text and embed crops, by the name that a setting gives.

Every heavy dependency has one file and is imported when it is first needed: OpenCV's selective search
boxes.py, ONNX Runtime lite0.py, transformers pretrained.py, the OCR engines ocr.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Pixels, Proposal, Word
from megaregion.curation.settings import OcrSettings, ProposeSettings
from megaregion.errors import UserError


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
        """Unit vectors, float32 [n, C], of RGB crops, uint8 [h, w, 3]; none depends on the others."""


class Reader(Protocol):
    """Finds and reads text in one image."""

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, RGB uint8 [h, w, 3]; nothing is filtered by confidence."""


class NoReader:
    """Reads nothing, for data sets that are wanted without text."""

    def read(self, image: Pixels) -> list[Word]:
        """No words."""
        return []


def load_reader(settings: OcrSettings) -> Reader:
    """The reader that the settings name; raises UserError where it is not installed or lacks its models."""
    if settings.ocr == "none":
        return NoReader()
    from megaregion.curation.engines.ocr import PaddleReader, RapidReader

    paddle = settings.ocr == "paddleocr"
    return PaddleReader(Path(settings.paddle)) if paddle else RapidReader(settings.ocr_side)


def load_proposer(settings: ProposeSettings) -> Proposer:
    """The proposer that the settings name. Raises UserError: SAM's weights cannot be loaded."""
    if settings.proposer == "sam":
        from megaregion.curation.engines.pretrained import SamProposer

        return SamProposer(Path(settings.sam), settings.sam_grid)
    from megaregion.curation.engines.boxes import SelectiveSearch

    return SelectiveSearch(settings.proposal_sides, settings.proposal_scales)


def load_embedder(name: str = "lite0", path: str | Path | None = None, side: int = 224) -> Embedder:
    """Load an embedder by name: clip from a folder of weights, or lite0.

    Lite0 resizes crops to a side in pixels, a multiple of 32. Raises UserError where the name is unknown or
    the weights cannot be loaded.
    """
    if name == "lite0":
        from megaregion.curation.engines.lite0 import Lite0Embedder

        return Lite0Embedder(side)
    if name == "clip":
        from megaregion.curation.engines.pretrained import ClipEmbedder

        if path is None:
            raise UserError("embedder clip needs the folder with its weights")
        return ClipEmbedder(Path(path))
    raise UserError(f"embedder must be lite0 or clip, got {name!r}")
