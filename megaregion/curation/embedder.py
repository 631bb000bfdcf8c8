"""Embeddings: one unit vector per crop, from EfficientNet-Lite0 or from CLIP.

Shapes: n crops, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megaregion.curation import lite0
from megaregion.curation.picture import Pixels, resize
from megaregion.errors import UserError

BATCH = 16
"""Crops that pass through a network at once."""


class Embedder(Protocol):
    """Maps crops of any size to unit vectors."""

    @property
    def name(self) -> str:
        """What the embeddings depend on; embeddings of equal names can be compared."""
        ...

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


def load_embedder(name: str = "lite0", path: str | Path | None = None, side: int = 224) -> Embedder:
    """Load an embedder by name.

    Args:
        name: lite0 or clip.
        path: Folder with CLIP's weights.
        side: Lite0 only: side, in pixels, to which a crop is resized; a multiple of 32.

    Raises:
        UserError: The name is unknown or the weights cannot be loaded.
    """
    if name == "lite0":
        return Lite0Embedder(side)
    if name == "clip":
        from megaregion.curation.clip import ClipEmbedder

        if path is None:
            raise UserError("embedder clip needs the folder with its weights")
        return ClipEmbedder(Path(path))
    raise UserError(f"embedder must be lite0 or clip, got {name!r}")


class Lite0Embedder:
    """EfficientNet-Lite0's mean-pooled features; crops are squeezed to a square.

    Args:
        side: Its side in pixels. 128 costs a third of 224; clusters are as good, neighbours less so.
    """

    dim = lite0.WIDTH

    def __init__(self, side: int = 224) -> None:
        self._side = side
        self._network = lite0.Lite0()

    @property
    def name(self) -> str:
        """The model's identity and the crops' size."""
        return f"{lite0.fingerprint()}-{self._side}px"

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops, see :class:`Embedder`."""
        vectors = [np.zeros((0, self.dim), dtype=np.float32)]
        for start in range(0, len(crops), BATCH):
            batch = [resize(crop, self._side, self._side) for crop in crops[start : start + BATCH]]
            vectors.append(self._network.embed(np.stack(batch)))
        return unit(np.concatenate(vectors))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale each row to length 1, [n, C]; a row of zeros stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
