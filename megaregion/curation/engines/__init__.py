"""The engines that find regions and text and embed crops, by the name that a setting gives.

Every heavy dependency has one file and is imported when it is first needed: OpenCV's selective search
boxes.py, ONNX Runtime lite0.py, transformers pretrained.py and sam.py, the OCR engines ocr.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from megaregion.curation.picture import Pixels, Proposal, Word
from megaregion.curation.settings import EmbedSettings, OcrSettings, ProposeSettings
from megaregion.errors import UserError

Item = TypeVar("Item")


class Proposer(Protocol):
    """Finds regions in images."""

    def stream(self, images: Iterable[tuple[Item, Any]]) -> Iterator[tuple[Item, list[Proposal]]]:
        """Each item with the regions of its view, in order; without a view, None, there are none.

        Views are what :func:`load_view` makes of images. Some may be read ahead of what is given.
        """


class Embedder(Protocol):
    """Maps crops of any size to unit vectors."""

    @property
    def dim(self) -> int:
        """Channels C of an embedding."""

    @property
    def side(self) -> int:
        """Side, in pixels, of the square to which it resizes crops."""

    def stream(
        self, images: Iterable[tuple[Item, Sequence[Pixels]]]
    ) -> Iterator[tuple[Item, NDArray[np.float32]]]:
        """Each item with the embeddings of its crops, in order; it may read some items ahead."""

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Unit vectors, float32 [n, C], of RGB crops, uint8 [h, w, 3]; none depends on the others."""


class Reader(Protocol):
    """Finds and reads text in one image."""

    def read(self, image: Pixels) -> list[Word]:
        """Read an image, RGB uint8 [h, w, 3]; nothing is filtered by confidence."""


def load_reader(settings: OcrSettings) -> Reader:
    """The reader that the settings name; raises UserError where it is not installed or lacks its models."""
    from megaregion.curation.engines.ocr import PaddleReader, RapidReader

    paddle = settings.ocr == "paddleocr"
    return PaddleReader(Path(settings.paddle)) if paddle else RapidReader(settings.ocr_side)


def load_proposer(settings: ProposeSettings) -> Proposer:
    """The proposer that the settings name. Raises UserError: SAM's weights cannot be loaded."""
    if settings.proposer == "sam":
        from megaregion.curation.engines.sam import load_sam

        return load_sam(Path(settings.sam), settings.sam_grid)
    from megaregion.curation.engines.boxes import SelectiveSearch

    return SelectiveSearch(settings.proposal_sides, settings.proposal_scales)


def load_view(settings: ProposeSettings) -> Callable[[Pixels], Any]:
    """What makes of an image, RGB uint8 [h, w, 3], what the proposer needs of it; loads no weights.

    Raises UserError where SAM's folder says not of what kind it is.
    """
    if settings.proposer == "sam":
        from megaregion.curation.engines.sam import load_view

        return load_view(Path(settings.sam))
    from megaregion.curation.engines.boxes import SelectiveSearch

    return SelectiveSearch(settings.proposal_sides, settings.proposal_scales).view


def load_embedder(name: str = "lite0", path: str | Path | None = None, side: int = 224) -> Embedder:
    """Load an embedder by name: hf or clip from a folder of weights, or lite0.

    Lite0 resizes crops to a side in pixels, a multiple of 32. Raises UserError where the name is unknown or
    the weights cannot be loaded.
    """
    if name == "lite0":
        from megaregion.curation.engines.lite0 import Lite0Embedder

        return Lite0Embedder(side)
    if name in ("hf", "clip"):
        from megaregion.curation.engines.pretrained import load_encoder

        if path is None:
            raise UserError(f"embedder {name} needs the folder with its weights")
        return load_encoder(Path(path), clip=name == "clip")
    raise UserError(f"embedder must be lite0, hf or clip, got {name!r}")


def weights_of(settings: EmbedSettings) -> str:
    """Folder of the weights of the embedder that the settings name; empty for lite0."""
    return {"hf": settings.encoder, "clip": settings.clip}.get(settings.embedder, "")
