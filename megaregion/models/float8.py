"""The blocks' matrix products in 8-bit floats, by torchao; weights, masters and all else stay as they are.

Each operand is scaled as a whole by its largest value, so that it uses the range of e4m3 (gradients: e5m2),
for every product anew. It pays where products are large: a ViT-bigG's, hardly a ViT-B's.
"""

from __future__ import annotations

import torch
from torch import nn

from megaregion.errors import UserError
from megaregion.models.linear import Linear

LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with 8-bit matrix units (Ada, then Hopper)."""
TORCHAO = "torchao==0.18.0"
"""Not in requirements.txt: where it is installed, transformers loads all of it with every import."""
GRAIN = 16
"""Widths must be multiples of it."""


def use_float8(blocks: nn.Module, device: torch.device) -> int:
    """Let every linear of the blocks multiply in 8 bits; returns how many do.

    Args:
        blocks: The transformer's blocks, changed in place; parameters stay the same objects.
        device: Where they run; a processor has no such units and computes the same numbers slowly.

    Raises:
        UserError: torchao is not installed, the GPU has no 8-bit matrix units, or no linear has a width that
            suits them.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise UserError(
            f"train.fp8 needs a GPU of compute capability 8.9 or more, got {found[0]}.{found[1]} "
            f"({torch.cuda.get_device_name(device)}); use train.fp8 false"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(f"train.fp8 needs {TORCHAO.partition('==')[0]}: pip install {TORCHAO}") from None

    def suits(module: nn.Module, name: str) -> bool:
        sizes = (module.in_features, module.out_features) if isinstance(module, Linear) else (1,)
        return not any(size % GRAIN for size in sizes)

    count = sum(suits(module, name) for name, module in blocks.named_modules())
    if not count:
        raise UserError(
            f"train.fp8 needs model.width and model.mlp_width to be multiples of {GRAIN}; no linear is"
        )
    # A micro-step's tokens need not be a multiple of 16: the products over them are padded.
    settings = Float8LinearConfig(pad_inner_dim=True, emulate=device.type == "cpu")
    convert_to_float8_training(blocks, module_filter_fn=suits, config=settings)
    return count
