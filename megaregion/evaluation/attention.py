"""Where a region token looks: its attention in the last block, inside its box and if it were let out.

A region token reads only patches of its region. What it reads of them shows what the region is known by;
the same query over the whole image shows what else looks like it.

Shapes: N regions of one image, T = 1 + P image tokens (class token first), h x w patches, H heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaregion.models import RegionEncoder


class Looks(NamedTuple):
    """Attention over patches, mean over heads, [N, h, w] each; an image's weights sum to at most 1."""

    inside: NDArray[np.float32]
    """As the network computes it: zero outside of the region."""
    anywhere: NDArray[np.float32]
    """The same query without its mask."""


@torch.inference_mode()
def region_attention(model: RegionEncoder, pixels: Tensor, visible: Tensor) -> Looks:
    """Attention of the region tokens of one image in the last block.

    Args:
        model: The network.
        pixels: One normalised image, [1, 3, H, W].
        visible: What each region sees, [1, N, P].
    """
    last: Any = model.vit.blocks[-1]
    seen: dict[str, Any] = {}
    hooks = [
        last.register_forward_pre_hook(lambda block, inputs: seen.update(inputs=inputs)),
        last.register_forward_hook(lambda block, inputs, outputs: seen.update(image=outputs[0])),
    ]
    try:
        model.vit(pixels, visible)
    finally:
        for hook in hooks:
            hook.remove()
    image, regions, angles, mask, _ = seen["inputs"]
    # A copy of the block for regions reads what the block has written, shared weights what enters it.
    block, image = (last, image) if last.region is None else (last.region, seen["image"])
    query = block.attention.project_regions(block.norm1(regions), angles, visible.shape[:2])
    _, key, _ = block.attention.project(block.norm1(image), angles)
    scores = query @ key.transpose(-1, -2) / key.shape[-1] ** 0.5
    patch = model.vit.config.patch_size
    grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    return Looks(_weights(scores + mask, grid), _weights(scores, grid))


def _weights(scores: Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    weights = scores.float().softmax(dim=-1).mean(dim=1)[0, :, 1:]
    array: NDArray[np.float32] = weights.unflatten(1, grid).cpu().numpy()
    return array
