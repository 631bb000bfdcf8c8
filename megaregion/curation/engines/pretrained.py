"""SAM as proposer and CLIP as embedder, from folders of weights as transformers' save_pretrained writes them.

Shapes: P points prompted at once, 3 masks each, h x w pixels of the image; n crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from megaregion.curation.engines.lite0 import embed_squares
from megaregion.curation.picture import Pixels, Proposal, resize
from megaregion.data.sample import encode_mask
from megaregion.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's statistics of R, G, B on the 0..1 scale."""
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""SAM's statistics of R, G, B on the 0..255 scale."""
POINTS = 64
"""Points that are prompted at once."""
MIN_IOU = 0.88
"""Masks whose own predicted IoU is less are dropped, as in SAM's automatic generator."""
MIN_STABILITY = 0.95
"""Masks whose area shrinks more when the threshold rises are dropped, likewise."""
STABILITY_OFFSET = 1.0
"""How far the threshold moves, in logits, when stability is judged."""


class SamProposer:
    """Masks of any SamModel from a grid of so many points a side, with least predicted IoU and stability.

    Raises UserError where the folder's weights cannot be loaded.
    """

    def __init__(
        self, folder: Path, grid: int, min_iou: float = MIN_IOU, min_stability: float = MIN_STABILITY
    ) -> None:
        from transformers import SamModel

        self._model = load_model(SamModel, folder)
        self._side = int(self._model.config.vision_config.image_size)
        self._grid, self._min_iou, self._min_stability = grid, min_iou, min_stability

    def propose(self, image: Pixels) -> list[Proposal]:
        """Propose a region for every good mask; the box is the mask's."""
        height, width = image.shape[:2]
        shrink = self._side / max(height, width)
        rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
        with torch.inference_mode():
            features = self._model.get_image_embeddings(self._padded(resize(image, columns, rows)))
            steps = (np.arange(self._grid) + 0.5) / self._grid
            points = np.stack(np.meshgrid(steps * columns, steps * rows), axis=-1).reshape(-1, 2)
            found: list[Proposal] = []
            for start in range(0, len(points), POINTS):
                prompts = torch.as_tensor(points[start : start + POINTS, None], dtype=torch.float32)
                result = self._model(
                    image_embeddings=features,
                    input_points=prompts[None].to(device()),
                    input_labels=torch.ones(1, len(prompts), 1, dtype=torch.long, device=device()),
                    multimask_output=True,
                )
                found += self._good(result, (rows, columns), (height, width))
        return found

    def _padded(self, image: Pixels) -> torch.Tensor:
        """The image normalised, in the upper left corner of the model's square, [1, 3, side, side]."""
        pixels = (torch.from_numpy(image.astype(np.float32)) - torch.tensor(SAM_MEAN)) / torch.tensor(SAM_STD)
        square = torch.zeros(1, 3, self._side, self._side)
        square[0, :, : image.shape[0], : image.shape[1]] = pixels.permute(2, 0, 1)
        return square.to(device())

    def _good(self, result: Any, inner: tuple[int, int], size: tuple[int, int]) -> list[Proposal]:
        """Turn the model's output for P points into proposals at the image's size."""
        ious = result.iou_scores.flatten()
        sure = ious >= self._min_iou
        logits = result.pred_masks.flatten(0, 2)[sure][:, None]
        high = (logits > STABILITY_OFFSET).sum(dim=(1, 2, 3))
        low = (logits > -STABILITY_OFFSET).sum(dim=(1, 2, 3))
        stable = (high >= self._min_stability * low) & (high > 0)
        logits, scores = logits[stable], ious[sure][stable]
        if not len(logits):
            return []
        large = interpolate(logits, (self._side, self._side), mode="bilinear", align_corners=False)
        large = interpolate(large[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)
        masks: NDArray[np.bool_] = (large[:, 0] > 0).cpu().numpy()
        pairs = zip(masks, scores.clamp(0, 1).tolist(), strict=True)
        return [_from_mask(mask, score) for mask, score in pairs if mask.any()]


def _from_mask(mask: NDArray[np.bool_], score: float) -> Proposal:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Proposal(box, score, encode_mask(mask))


class ClipEmbedder:
    """The pooled output of any CLIPVisionModel; crops are squeezed to the model's square.

    Raises UserError where the folder's weights, of a full CLIP model or its vision part, cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPVisionModel

        self._model = load_model(CLIPVisionModel, folder)
        self._side = int(self._model.config.image_size)
        self.dim = int(self._model.config.hidden_size)

    def embed(self, crops: Sequence[Pixels]) -> NDArray[np.float32]:
        """Embed crops, see :class:`megaregion.curation.engines.Embedder`."""
        return embed_squares(crops, self._side, self.dim, self._pooled)

    def _pooled(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = (255 * np.asarray(values, np.float32) for values in (CLIP_MEAN, CLIP_STD))
        pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2).to(device())
        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(pixel_values=pixels).pooler_output.float().cpu().numpy()
        return found


def device() -> torch.device:
    """A GPU if there is one; else the CPU, on one thread: workers are the unit of parallelism."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def load_model(kind: Any, folder: Path) -> Any:
    """Load a model of a given class for inference, from safetensors alone and without the network.

    Raises UserError where the folder has no such model, or not all of its weights.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        model, report = kind.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} holds no {kind.__name__} that can be loaded: {reason}") from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"{folder} lacks {len(missing)} weights of {kind.__name__}, {missing[0]} first; "
            "give a folder that save_pretrained wrote"
        )
    return model.eval().to(device())
