"""The formats that a checkpoint is written in: names, settings and what stands beside the weights.

``mlcd`` is that of transformers' MLCDVisionModel; its names lie in checkpoint/pretrained.py, which reads
them too. ``llava-onevision-1.5`` is that of LLaVA-OneVision-1.5's RICE tower, which brings its own patch
merger:

    visual.class_embedding (D)        visual.patch_embed.proj.weight (D, 3, p, p)
    visual.class_pos_emb (1, d/2)     visual.pre_layernorm.*
    visual.blocks.N.norm1.*  norm2.*  attn.qkv.* (3D, D)  attn.proj.*  mlp.fc1.*  mlp.fc2.*

What that tower does was read in public copies of its model file (``RiceTransformer``, ``RiceAttention``) and
in key lists of conversion scripts: qkv's rows are all queries, then all keys, then all values; rotary angles,
class token and norms are as in MLCDVisionModel; the last norm is not there, for only patches are read; its
patch merger begins untrained. Patches arrive in blocks of 2 x 2, which changes no weight and, as positions
are looked up by place, no feature. NVIDIA's port of that tower gives our patch features (a drill runs it).

Shapes: D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaregion.checkpoint.pretrained import PREFIX, PROJECTION, QUERY, REGION, mlcd_tensors
from megaregion.config import DataConfig, ModelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.files import read_json

REGION_CODE = Path(__file__).with_name("modeling_megaregion.py")
"""The class with ``get_region_features``; a copy goes beside the weights."""
ASPECT_CODE = Path(__file__).with_name("image_processing_megaregion.py")
"""The image processor that keeps shapes; a copy goes beside it."""
ASPECT = "aspect"
"""Folder of that processor's settings in an export."""
NO_CLIP = "none: this is an MLCD tower, whose rotary positions CLIP's class would drop"
"""Value of ``projection_dim`` in config.json. MLCD has no such setting; CLIP's class of transformers 5 wants
a number there, and so refuses a folder that it would else fill with a random position table."""

MERGED_SIDE = 2
"""Patches along one side of the square that the merger joins into one token."""

_LLAVA_NAMES = {
    "patch_embedding": "patch_embed.proj", "pre_norm": "pre_layernorm", "attention.out": "attn.proj",
    "attention.qkv": "attn.qkv",
}  # fmt: skip
"""Parts of our names that are others there."""


@dataclass(frozen=True)
class Layout:
    """One format."""

    tensors: Callable[[str, Tensor, ModelConfig], Iterator[tuple[str, Tensor]]]
    """Key and value in the format of one parameter of RegionEncoder."""
    settings: Callable[[ModelConfig, torch.dtype], dict[str, Any]]
    """Content of config.json, without regions."""
    processor: Callable[[ModelConfig, DataConfig], dict[str, Any]]
    """Content of preprocessor_config.json."""
    regions: bool
    """Whether it has a place for the region part."""
    merged: int = 1
    """Patches along a side of the square that its patch merger joins; 1 without a merger. Sides of images are
    multiples of so many patches, and what the merger gives is as wide as an LLM's tokens."""


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
        "projection_dim": NO_CLIP,
    }


def mlcd_processor(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json: shortest edge to the training size, center crop, normalise."""
    side = model.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        **_pixels(data),
    }


def aspect_processor(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Content of aspect/preprocessor_config.json: the patches of training, the image's own shape."""
    return {
        "image_processor_type": "AspectImageProcessor",
        "auto_map": {"AutoImageProcessor": f"{ASPECT_CODE.stem}.AspectImageProcessor"},
        "patch_size": model.patch_size,
        "max_patches": (model.image_size // model.patch_size) ** 2,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }


def region_config(run: RunConfig, projected: bool) -> dict[str, Any]:
    """What config.json holds besides where the region part comes along, with a projection or without.

    With registers it is a model type of its own: MLCD's class would leave them out without a word.
    """
    names = {"AutoModel": "RegionVisionModel"}
    own: dict[str, Any] = {}
    if run.model.registers:
        names = {"AutoConfig": "RegisterVisionConfig", "AutoModel": "RegisterVisionModel"}
        own = {"model_type": "megaregion_vit", "num_register_tokens": run.model.registers}
        own["architectures"] = [names["AutoModel"]]
    if run.model.region_start == "learned":
        own["region_start"] = "learned"
    return own | {
        "auto_map": {auto: f"{REGION_CODE.stem}.{name}" for auto, name in names.items()},
        "region_layers": run.model.region_layers,
        "region_weights": run.model.region_weights,
        "patch_coverage": run.data.patch_coverage,
        "region_dim": run.head.embedding_dim if projected else None,
    }


def _mlcd_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    if name == PROJECTION:
        yield name, tensor
        return
    for key, value in mlcd_tensors(name.removeprefix("vit."), tensor, config):
        yield (key if key.startswith((REGION, QUERY)) else PREFIX + key), value


def _llava_tensors(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Rename, and reorder the rows of a fused projection; the tower has no last norm."""
    key = name.removeprefix("vit.")
    if key.startswith("post_norm."):
        return
    if ".attention.qkv." in key:
        heads = tensor.view(config.heads, 3, config.head_dim, *tensor.shape[1:])
        tensor = heads.transpose(0, 1).flatten(0, 2)
    for ours, theirs in _LLAVA_NAMES.items():
        key = key.replace(ours, theirs)
    yield f"visual.{key}", tensor


def llava_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Content of config.json: what that project keeps as its ``vision_config``.

    Raises:
        UserError: A setting that its tower has fixed.
    """
    if config.rope_theta != 10_000:
        raise UserError(
            f"model.rope_theta {config.rope_theta:g} of this checkpoint cannot be written as "
            "llava-onevision-1.5, whose tower has fixed 10000; use the default format"
        )
    return {
        "model_type": "rice_vit",
        "dtype": str(dtype).removeprefix("torch."),
        "depth": config.depth,
        "embed_dim": config.width,
        "hidden_size": config.width,
        "hidden_act": config.activation,
        "intermediate_size": config.mlp_width,
        "num_heads": config.heads,
        "in_channels": 3,
        "patch_size": config.patch_size,
        "spatial_merge_size": MERGED_SIDE,
        "temporal_patch_size": 1,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": 0.02,
    }


def text_config(file: Path) -> dict[str, Any]:
    """What config.json holds besides for the merger to fit an LLM, of that LLM's config.json.

    Raises:
        UserError: It says no width.
    """
    try:
        content = read_json(file)
        text = content.get("text_config", content)
        width = text["hidden_size"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        width = None
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise UserError(f"--llm: {file} says no hidden_size; give the config.json of a language model")
    return {"text_hidden_size": width}


def llava_processor(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Content of preprocessor_config.json: any size whose sides whole squares of patches fill."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": model.patch_size,
        "merge_size": MERGED_SIDE,
        "temporal_patch_size": 1,
        **_pixels(data),
    }


def _pixels(data: DataConfig) -> dict[str, Any]:
    """What both image processors do to pixels."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # Pillow's number for bicubic.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }


LAYOUTS = {
    "mlcd": Layout(_mlcd_tensors, mlcd_config, mlcd_processor, regions=True),
    "llava-onevision-1.5": Layout(_llava_tensors, llava_config, llava_processor, False, MERGED_SIDE),
}
"""Formats by the name that the command line knows."""
