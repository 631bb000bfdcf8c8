"""Our parameters and settings as those of transformers' ``MLCDVisionModel``, without importing it.

Shapes: D width, H heads, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaregion.config import DataConfig, ModelConfig

_WHOLE = {
    "class_pos_emb": "class_pos_emb",
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm": "pre_layrnorm",  # The misspelling is theirs, and part of the format.
    "post_norm": "post_layernorm",
}

_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")

_FUSED = "attention.qkv"


def mlcd_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Rename one parameter, and split it where it is a fused projection.

    Args:
        name: Name of the parameter in VisionTransformer.
        tensor: The whole parameter.
        config: The model's settings.

    Yields:
        Name and tensor in MLCDVisionModel.

    Raises:
        KeyError: VisionTransformer has no such parameter.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        stem, _, end = name.rpartition(".")
        yield (f"{_WHOLE[stem]}.{end}" if stem in _WHOLE else _WHOLE[name]), tensor
        return
    block, part, end = match.groups()
    if part != _FUSED:
        yield f"encoder.layers.{block}.{_IN_BLOCK[part]}.{end}", tensor
        return
    # Rows are laid out (heads, 3, head width): a plain chunk in three would mix heads up.
    heads = tensor.view(config.heads, 3, config.head_dim, *tensor.shape[1:])
    for index, letter in enumerate("qkv"):
        yield f"encoder.layers.{block}.self_attn.{letter}_proj.{end}", heads[:, index].flatten(0, 1)


def mlcd_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["MLCDVisionModel"],
        "model_type": "mlcd_vision_model",
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
