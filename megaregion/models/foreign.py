"""Vision transformers of HuggingFace's library: loaded from safetensors, and asked about images.

Shapes: B images of H x W pixels, h x w patches of each, C feature width.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaregion.errors import UserError

LAST_NORMS = ("post_layernorm", "layernorm", "norm")
"""Names that its vision transformers give the norm behind their last block."""
LEARNED_PATCHES = ("siglip", "dinov2", "dinov3")
"""Kinds of models whose own loss reads what their last block makes of patches."""
INTERPOLATE = "interpolate_pos_encoding"
"""Asks a model that learned its positions for those of images of another size."""
POOLER = "pooler."
"""In the names of weights that a model has for whole images alone, and many folders lack."""


@dataclass(frozen=True)
class Foreign:
    """A vision transformer, ready to be asked."""

    model: Any
    patch: int
    """Side of a patch, in pixels."""
    side: int
    """Side of the images that it was trained on, in pixels."""
    mean: tuple[float, ...]
    """Subtracted from R, G, B on the 0..1 scale."""
    std: tuple[float, ...]
    """Divides R, G, B on the 0..1 scale."""


def load(path: str, trust: bool = False, dtype: torch.dtype = torch.float32) -> Foreign:
    """Load a folder that save_pretrained wrote, or a model by its hub id, from safetensors alone.

    Of a model of images and text the part that sees is taken. Code that lies beside the weights runs only
    where it is trusted.

    Raises:
        UserError: It cannot be loaded, lacks weights, or is no vision transformer.
    """
    from transformers import AutoModel, ImageProcessingMixin
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModel.from_pretrained(
            path, use_safetensors=True, dtype=dtype, trust_remote_code=trust, output_loading_info=True
        )
        # Not the processor itself: those of DINOv3 and others want torchvision.
        processor, _ = ImageProcessingMixin.get_image_processor_dict(path)
        mean, std = (tuple(map(float, processor[key])) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "name a folder that save_pretrained wrote or a hub id"
        raise UserError(f"{path} cannot be loaded ({reason}); {advice}") from None
    if missing := sorted(name for name in found["missing_keys"] if POOLER not in name):
        raise UserError(f"{path} lacks {len(missing)} weights, {missing[0]} first; copy it again")
    if not hasattr(model, "get_region_features"):
        model = getattr(model, "vision_model", model)
    patches, patch = (getattr(model.config, key, None) for key in ("num_patches", "patch_size"))
    side = getattr(model.config, "image_size", None) or (patches and patch and patch * math.isqrt(patches))
    if not isinstance(side, int) or not isinstance(patch, int):
        without = "its config has no image_size and patch_size in pixels"
        raise UserError(f"{path} is no vision transformer: {without}")
    return Foreign(model.eval(), patch, side, mean, std)


def skeleton(path: str) -> Any:
    """What :func:`load` loads, without weights, on the meta device; only settings are read.

    Raises:
        OSError, ValueError, KeyError: They cannot be read, or are no model's.
    """
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    vision = getattr(config, "vision_config", config)
    with torch.device("meta"):
        return MODEL_MAPPING[type(vision)]._from_config(vision, attn_implementation="eager").eval()


def inputs(model: Any, pixels: Tensor) -> dict[str, Any]:
    """What a model takes for normalised images, [B, 3, H, W], of any size that it can see."""
    config = model.config
    if config.model_type == "siglip2_vision_model":
        # It takes patches of images of any shape, row by row, and how many there are; asked on the host.
        side = config.patch_size
        cells = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
        patches = cells.flatten(3).flatten(1, 2)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": patches.new_ones(patches.shape[:2], dtype=torch.bool),
            "spatial_shapes": torch.tensor([cells.shape[1:3]]).expand(len(pixels), 2),
        }
    size = getattr(config, "image_size", None)
    other = isinstance(size, int) and tuple(pixels.shape[2:]) != (size, size)
    asks = other and INTERPOLATE in inspect.signature(model.forward).parameters
    return {"pixel_values": pixels, **({INTERPOLATE: True} if asks else {})}


def see(model: Any, pixels: Tensor) -> tuple[Any, Tensor]:
    """What a model gives for normalised images, [B, 3, H, W], and its features of patches, [B, h, w, C].

    These are what enters the last block, with the last norm, as of the run's own network: no loss ever
    reached what that block makes of patches. Where the model's own loss reads patches, they are what leaves
    it.
    """
    learned = model.config.model_type.startswith(LEARNED_PATCHES)
    output = model(**inputs(model, pixels), output_hidden_states=not learned)
    patches = output.last_hidden_state
    if not learned:
        norms = (getattr(model, name, None) for name in LAST_NORMS)
        norm = next((norm for norm in norms if norm is not None), nn.Identity())
        patches = norm(output.hidden_states[-2])
    rows, columns = (edge // model.config.patch_size for edge in pixels.shape[2:])
    return output, patches[:, -rows * columns :].unflatten(1, (rows, columns))


def pooled(output: Any) -> Tensor:
    """What a model says of whole images, [B, C]: what it pools, or its class token."""
    found = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if found is None else found.flatten(1)
