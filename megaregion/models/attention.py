"""Attention of a block: image tokens see each other, region tokens see their own patches.

Shapes: B images, T = 1 + P image tokens (class token first), N region tokens, D width, H heads (those of
this rank, when the linears are cut from outside), d head width. Where the tokens between the linears are cut
too (see stream.py), [B, T, D] stands for this rank's part of them, [rows, D].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megaregion.config import ModelConfig
from megaregion.models.linear import Linear
from megaregion.models.packed import packed_attention
from megaregion.models.rotary import Rotation, split_and_turn, turn


class Attention(nn.Module):
    """Multi-head attention with 2D rotary positions and one fused projection.

    The rows of ``qkv`` are laid out (H, 3, d): cut into equal parts, each holds whole heads, so the module
    need not know how many heads its linears have.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)

    def project(self, image: Tensor, angles: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Project the image's tokens.

        Args:
            image: Normalised image tokens, [B, T, D].
            angles: Angles of the T tokens.

        Returns:
            Queries, keys and values, [B, H, T, d] each; queries and keys turned.
        """
        return split_and_turn(self._by_heads(self.qkv(image), angles.images, len(angles.cos)), angles)

    def project_regions(self, regions: Tensor, angles: Rotation, shape: tuple[int, int]) -> Tensor:
        """Project region tokens to queries, turned by the class token's angle.

        Args:
            regions: Normalised region tokens, [B, N, D].
            angles: Angles of the image.
            shape: B and N.

        Returns:
            Queries, [B, H, N, d].
        """
        query = self._by_heads(self.qkv(regions), *shape)[:, :, :, 0].transpose(1, 2)
        return turn(query, angles.class_angle.cos(), angles.class_angle.sin())

    def _by_heads(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        """The fused projection of all tokens, without rows that pad a cut, as [B, tokens, H, 3, d]."""
        rows = qkv.flatten(0, -2)
        if len(rows) > images * tokens:
            rows = rows[: images * tokens]
        return rows.view(images, tokens, -1, 3, self.head_dim)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Let queries read the image.

        Args:
            query: Queries, [B, H, Q, d].
            key: Keys of the image's tokens, [B, H, T, d].
            value: Values of the image's tokens, [B, H, T, d].
            mask: Added to the scores, [B, 1, Q, T]; 0 where a query sees a token, -inf where not.
            lengths: Tokens of each image where images share one sequence; keys are then [1, H, S, d] and
                masks [1, 1, Q, S], S the tokens of all; queries are too, or [images, H, Q, d] with a mask.

        Returns:
            What the queries read, projected, [B, Q, D].
        """
        if lengths is None:
            read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            read = packed_attention(query, key, value, mask, lengths)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out
