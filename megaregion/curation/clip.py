"""CLIP's vision model as embedder; the only file besides sam.py that imports transformers.

Shapes: n crops, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megaregion.curation.embedder import BATCH, unit
from megaregion.curation.picture import Pixels, resize
from megaregion.curation.weights import describe, device, load_model

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics of R, G, B on the 0..1 scale."""


class ClipEmbedder:
    """The pooled output of any CLIPVisionModel; crops are squeezed to the model's square.

    Args:
        folder: Weights and config.json, as save_pretrained writes them; a full CLIP model's will do.

    Raises:
        UserError: They cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPVisionModel

        self._model = load_model(CLIPVisionModel, folder)
        self._side = int(self._model.config.image_size)
        self.name = f"clip-{describe(folder)}"
        self.dim = int(self._model.config.hidden_size)

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops, see :class:`megaregion.curation.embedder.Embedder`."""
        vectors = [np.zeros((0, self.dim), dtype=np.float32)]
        mean, std = (255 * np.asarray(values, np.float32) for values in (MEAN, STD))
        for start in range(0, len(crops), BATCH):
            batch = [resize(crop, self._side, self._side) for crop in crops[start : start + BATCH]]
            pixels = torch.from_numpy((np.stack(batch) - mean) / std).permute(0, 3, 1, 2).to(device())
            with torch.inference_mode():
                vectors.append(self._model(pixel_values=pixels).pooler_output.float().cpu().numpy())
        return unit(np.concatenate(vectors))
