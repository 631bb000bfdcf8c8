"""How far an exported folder's features are from the checkpoint's own; the one file that loads transformers.

Shapes: B images, T = 1 + P image tokens, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megaregion.export.huggingface import BODY, run_config
from megaregion.models import VisionTransformer
from megaregion.training.checkpoint import CheckpointReader


def load_transformer(checkpoint: Path, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    """Build the transformer of a checkpoint, in float32.

    Args:
        checkpoint: A step folder.
        dtype: Type that the weights are rounded to on the way.
    """
    reader = CheckpointReader(checkpoint)
    vit = VisionTransformer(run_config(reader).model)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(reader.read(BODY + name).to(dtype))
    return vit.eval()


@torch.no_grad()
def feature_difference(checkpoint: Path, exported: Path, dtype: torch.dtype = torch.float32) -> float:
    """Compare all features of noise at the training size, at a larger one and at a non-square one.

    Args:
        checkpoint: A step folder.
        exported: The folder made of it.
        dtype: Type of the exported weights.

    Returns:
        The largest difference of patch features, class features and pooled outputs, as a share of the
        largest feature.
    """
    from transformers import AutoModel

    ours = load_transformer(checkpoint, dtype)
    theirs = AutoModel.from_pretrained(exported, dtype=torch.float32).eval()
    side, patch = ours.config.image_size, ours.config.patch_size
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for height, width in ((side, side), (side + patch, side + patch), (side + patch, side)):
        images = torch.randn(1, 3, height, width, generator=generator)
        tokens = ours(images).image
        output = theirs(pixel_values=images)
        worst = max(
            worst,
            _share(tokens, output.last_hidden_state),
            _share(ours.pool(tokens[:, 0]), output.pooler_output),
        )
    return worst


def _share(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())
