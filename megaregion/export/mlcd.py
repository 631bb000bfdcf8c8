"""Our settings as those of transformers' ``MLCDVisionModel``, without importing it."""

from __future__ import annotations

from typing import Any

import torch

from megaregion.config import DataConfig, ModelConfig


def mlcd_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["MLCDVisionModel"],
        "model_type": "mlcd",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_groups": 1,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "axial", "rope_theta": config.rope_theta},
    }


def processor_config(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json: shortest edge to the training size, center crop, normalise."""
    side = model.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # Pillow's number for bicubic.
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }
