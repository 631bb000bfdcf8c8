"""Any vision transformer in HuggingFace form as a further row; the one file here that loads transformers.

Shapes: B images, R regions, h x w patches, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megaregion.config import DataConfig, ModelConfig
from megaregion.data.transforms import EvalTransform
from megaregion.errors import UserError
from megaregion.evaluation.encoders import BoxedImage, CropEncoder, Features, Pixels

BATCH = 32
"""Crops that go through the model at once."""
LAST_NORMS = ("post_layernorm", "layernorm", "norm")
"""Names that vision transformers give the norm behind their last block."""


class HuggingFaceEncoder:
    """Regions as the mean of the patches that their box covers; whole images are encoded once.

    Args:
        name: Name in the table.
        model: A vision transformer of transformers.
        transform: Resizes whole images, as the model expects them.
        device: Where the model computes.
    """

    text_centers = None

    def __init__(self, name: str, model: Any, transform: EvalTransform, device: str = "cpu") -> None:
        self.name = name
        self._model = model.to(device).eval()
        self._transform = transform
        self._device = device

    def encode(self, items: Sequence[BoxedImage]) -> Features:
        """Encode all regions of a batch of images, image by image, [R, C]."""
        seen = [self._transform(item.image, item.boxes.tolist())[1].numpy() for item in items]
        maps = self.maps([item.image for item in items])
        regions = [
            visible.astype(np.float32) @ own.reshape(-1, own.shape[-1]) / visible.sum(axis=1, keepdims=True)
            for visible, own in zip(seen, maps, strict=True)
        ]
        return Features(np.concatenate(regions).astype(np.float32))

    def images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Pooled feature of each whole image, [B, C]."""
        return self._encode(images)[0]

    def maps(self, images: Sequence[Image.Image]) -> list[NDArray[np.float32]]:
        """Patch features of each image, [h, w, C] each."""
        return self._encode(images)[1]

    def crops(self) -> CropEncoder:
        """The same model asked about each region's crop, as the curation encoder is."""
        return CropEncoder(f"{self.name}/crops", self._embed)

    def _embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        parts = [
            self.images([Image.fromarray(crop) for crop in crops[start : start + BATCH]])
            for start in range(0, len(crops), BATCH)
        ]
        return np.concatenate(parts)

    @torch.inference_mode()
    def _encode(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Pooled features [B, C], and maps of what enters the last block, as of the run's own network."""
        pixels = torch.stack([self._transform(image, [])[0] for image in images]).to(self._device)
        output = self._model(pixel_values=pixels, output_hidden_states=True)
        pooled = getattr(output, "pooler_output", None)
        image = output.last_hidden_state[:, 0] if pooled is None else pooled
        side = self._transform.patch
        rows, columns = self._transform.height // side, self._transform.width // side
        patches = self._norm(output.hidden_states[-2])[:, -rows * columns :]
        return _array(image), list(_array(patches.unflatten(1, (rows, columns))))

    def _norm(self, tokens: Tensor) -> Tensor:
        for name in LAST_NORMS:
            norm = getattr(self._model, name, None)
            if norm is not None:
                normed: Tensor = norm(tokens)
                return normed
        return tokens


def load_huggingface(path: str, device: str = "cpu") -> HuggingFaceEncoder:
    """Load a folder that save_pretrained wrote, or a model by its hub id, from safetensors alone.

    Raises:
        UserError: It cannot be loaded, or is no vision transformer.
    """
    from transformers import AutoImageProcessor, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"--compare {path} cannot be loaded ({reason}); name a folder that save_pretrained wrote or a "
            "hub id"
        ) from None
    model = getattr(model, "vision_model", model)
    side, patch = (getattr(model.config, key, None) for key in ("image_size", "patch_size"))
    if not isinstance(side, int) or not isinstance(patch, int):
        raise UserError(
            f"--compare {path} is no vision transformer: its config has no image_size and patch_size in "
            "pixels"
        )
    data = DataConfig(mean=tuple(processor.image_mean), std=tuple(processor.image_std))
    transform = EvalTransform(data, ModelConfig(image_size=side, patch_size=patch))
    return HuggingFaceEncoder(Path(path).name or path, model, transform, device)


def _array(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
