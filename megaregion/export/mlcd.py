"""Our parameters and settings as those of transformers' ``MLCDVisionModel``, and back, without importing it.

In a folder keys begin with ``vision_model.`` and config.json says ``mlcd``, as the released folders do:
transformers 4.57 finds neither without, and would fill the model with random weights; 5.x takes both.

Shapes: D width, H heads, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megaregion.config import DataConfig, ModelConfig

PREFIX = "vision_model."
"""Begins every key of the encoder in a folder; in memory transformers 5.x has none."""

REGION = "region_layers."
"""Begins the keys of region tokens' own weights, which only the region class knows; see regions.py."""

_WHOLE = {
    "class_pos_emb": "class_pos_emb",
    "class_embedding": "embeddings.class_embedding",
    "patch_embedding": "embeddings.patch_embedding",
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

_BLOCK = re.compile(r"blocks\.(\d+)\.(region\.)?(.+)\.(weight|bias)")

_FUSED = "attention.qkv"


def mlcd_keys(name: str, config: ModelConfig) -> list[str]:
    """Names in MLCDVisionModel of one of our parameters: one, or queries, keys and values apart.

    Args:
        name: Name of the parameter in VisionTransformer.
        config: The model's settings.

    Raises:
        KeyError: VisionTransformer has no such parameter.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        stem, _, end = name.rpartition(".")
        return [f"{_WHOLE[stem]}.{end}" if stem in _WHOLE else _WHOLE[name]]
    block, own, part, end = match.groups()
    first = config.depth - config.region_layers
    layer = f"{REGION}{int(block) - first}" if own else f"encoder.layers.{block}"
    if part != _FUSED:
        return [f"{layer}.{_IN_BLOCK[part]}.{end}"]
    return [f"{layer}.self_attn.{letter}_proj.{end}" for letter in "qkv"]


def mlcd_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Rename one parameter, and split it where it is a fused projection.

    Args:
        name: Name of the parameter in VisionTransformer.
        tensor: The whole parameter; one on the meta device gives the shapes.
        config: The model's settings.

    Yields:
        Name and tensor in MLCDVisionModel.

    Raises:
        KeyError: VisionTransformer has no such parameter.
    """
    keys = mlcd_keys(name, config)
    if len(keys) == 1:
        yield keys[0], tensor
        return
    # Rows are laid out (heads, 3, head width): a plain chunk in three would mix heads up.
    heads = tensor.view(config.heads, 3, config.head_dim, *tensor.shape[1:])
    for index, key in enumerate(keys):
        yield key, heads[:, index].flatten(0, 1)


def join_mlcd(name: str, read: Callable[[str], Tensor], config: ModelConfig) -> Tensor:
    """Put one of our parameters together from theirs; undoes :func:`mlcd_tensors`.

    Args:
        name: Name of the parameter in VisionTransformer.
        read: Gives the tensor of a key of theirs.
        config: The model's settings.
    """
    parts = [read(key) for key in mlcd_keys(name, config)]
    if len(parts) == 1:
        return parts[0]
    heads = [part.view(config.heads, config.head_dim, *part.shape[1:]) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)


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
