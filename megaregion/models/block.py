"""One pre-norm transformer block, for image tokens and for the region tokens that ride along.

Shapes: B images, T = 1 + P image tokens (class token first), N region tokens, D width. Where the tokens
between the linears are cut (see stream.py), [B, T, D] stands for this rank's part of them, [rows, D].
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaregion.config import Activation, ModelConfig
from megaregion.models.attention import Attention
from megaregion.models.linear import Linear
from megaregion.models.recompute import remade
from megaregion.models.rotary import Rotation


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid form of gelu, as in CLIP's first weights."""
    return x * torch.sigmoid(1.702 * x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    # Not a call of the module: in a backward pass ZeRO 3 would take it for the next one's forward pass.
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class MLP(nn.Module):
    """Two linears with a non-linearity between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, cheap: bool = False) -> Tensor:
        """Map tokens [..., D] to [..., D].

        Args:
            x: Tokens.
            cheap: Compute the non-linearity again in the backward pass instead of keeping its result.
        """
        hidden: Tensor = self.fc1(x)
        active = self.activation(hidden)
        with remade(active, hidden, self.activation) if cheap else nullcontext():
            y: Tensor = self.fc2(active)
        return y


class Block(nn.Module):
    """A pre-norm block; ``region`` holds the region tokens' own weights, if they have any.

    Attributes:
        cheap: Make what norms and the non-linearity give to image tokens again in the backward pass.
    """

    def __init__(self, config: ModelConfig, separate_regions: bool = False) -> None:
        super().__init__()
        self.cheap = False
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.region = Block(config) if separate_regions else None

    def forward(
        self,
        image: Tensor,
        regions: Tensor | None,
        angles: Rotation,
        mask: Tensor | None,
        image_ends_here: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one block.

        Region tokens go through calls of their own: the rounding of a matrix product depends on how many
        rows it has, and image tokens must not change by a bit when regions come along.

        Args:
            image: Image tokens, [B, T, D].
            regions: Region tokens, [B, N, D], or None where no region rides along.
            angles: Angles of the image's tokens.
            mask: What each region sees, [B, 1, N, T], 0 or -inf; None without regions.
            image_ends_here: Nobody reads the image tokens after this block: return those that came in.

        Returns:
            Image tokens and region tokens after the block.
        """
        normed = self.norm1(image)
        with remade(normed, image, partial(_norm, self.norm1)) if self.cheap else nullcontext():
            query, key, value = self.attention.project(normed, angles)
        if regions is not None and self.region is None:
            regions = self._read(regions, key, value, angles, mask)
        if not (image_ends_here and self.region is None):
            # Into what the linears have just written: the sums need no memory of their own.
            image = self.attention.mix(query, key, value, lengths=angles.lengths).add_(image)
            image = self._mlp(image).add_(image)
        if regions is not None and self.region is not None:
            # Own weights read what the block has written, or the last block's would get no gradient.
            _, key, value = self.region.attention.project(self.region.norm1(image), angles)
            regions = self.region._read(regions, key, value, angles, mask)
        return image, regions

    def _mlp(self, image: Tensor) -> Tensor:
        normed = self.norm2(image)
        with remade(normed, image, partial(_norm, self.norm2)) if self.cheap else nullcontext():
            return self.mlp(normed, self.cheap)

    def _read(
        self, regions: Tensor, key: Tensor, value: Tensor, angles: Rotation, mask: Tensor | None
    ) -> Tensor:
        assert mask is not None
        images = angles.images if angles.lengths is None else len(angles.lengths)
        query = self.attention.project_regions(self.norm1(regions), angles, (images, mask.shape[2]))
        regions = self.attention.mix(query, key, value, mask, angles.lengths).add_(regions)
        return self.mlp(self.norm2(regions)).add_(regions)
