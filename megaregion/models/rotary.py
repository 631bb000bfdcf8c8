"""2D rotary positions: queries and keys turn by angles of their patch's row and column.

A head's width d is d/2 pairs (i, i + d/2). The first half of the pairs turns by the row, the second
by the column, at frequencies theta^(-2i / (d/2)); the class token turns by a learned angle.
The layout is that of transformers' ``MLCDVisionModel``.

Shapes: B images, P patches, T = 1 + P image tokens (class token first), H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How the images of a batch share one sequence: each image's tokens behind those of the image before."""

    lengths: tuple[int, ...]
    """Tokens of each image."""
    boundaries: Tensor
    """Where each image starts and the last one ends, int32 [images + 1], on the device."""

    @property
    def starts(self) -> Tensor:
        """Where each image's class token stands, int32 [images]."""
        return self.boundaries[:-1]


class Rotation(NamedTuple):
    """The angles of a batch's tokens; what every block of a forward pass shares."""

    class_angle: Tensor
    """Learned angle of the class token and so of every region token, [d/2] float32; carries the gradient."""
    cos: Tensor
    """Cosine of every image token's angles, for both of a pair, [T, d] float32; constant to autograd."""
    sin: Tensor
    """Sine of the same angles, [T, d/2] float32; constant to autograd."""
    sequences: int
    """B: sequences of T tokens."""
    packing: Packing | None = None
    """How the images share one sequence of T tokens, if they do; B is then 1."""

    @property
    def images(self) -> int:
        """Images of the batch."""
        return self.sequences if self.packing is None else len(self.packing.lengths)


def packed_rotation(class_angle: Tensor, grids: Sequence[tuple[int, int]], theta: float) -> Rotation:
    """The angles of images in one sequence, each behind its class token; grids are (rows, columns)."""
    parts = [rotation(class_angle, rows, columns, theta, 1) for rows, columns in grids]
    cos, sin = torch.cat([part.cos for part in parts]), torch.cat([part.sin for part in parts])
    lengths = tuple(1 + rows * columns for rows, columns in grids)
    # Once a pass, and without waiting for a GPU: a list of indices in each block would wait for it each time.
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(cos.device, non_blocking=True)
    return Rotation(class_angle.float(), cos, sin, 1, Packing(lengths, boundaries))


def rotation(class_angle: Tensor, rows: int, columns: int, theta: float, images: int) -> Rotation:
    """The angles of B images of one size: of the class token and of rows * columns patches, row by row.

    ``class_angle`` is the learned one, [d/2]; ``theta`` the base of the frequencies.
    """
    class_angle = class_angle.float()
    cos, sin = _patch_table(rows, columns, class_angle.shape[-1], theta, class_angle.device)
    fixed = class_angle.detach()[None]
    cos = torch.cat((fixed.cos(), cos))
    return Rotation(class_angle, torch.cat((cos, cos), dim=-1), torch.cat((fixed.sin(), sin)), images)


@lru_cache(maxsize=64)
def _patch_table(
    rows: int, columns: int, pairs: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    steps = torch.arange(0, pairs, 2, dtype=torch.float32, device=device) / pairs
    frequencies = 1.0 / theta**steps
    row = torch.arange(rows, dtype=torch.float32, device=device)[:, None] * frequencies
    column = torch.arange(columns, dtype=torch.float32, device=device)[:, None] * frequencies
    by_row = row[:, None].expand(rows, columns, -1)
    by_column = column[None].expand(rows, columns, -1)
    angles = torch.cat((by_row, by_column), dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of vectors [..., d]; gradients reach the angles too.

    Cosines and sines broadcast to [..., d/2]. Computed in at least float32, returned in the type of x.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def split_and_turn(qkv: Tensor, angles: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection [B, T, H, 3, d] into q, k, v, [B, H, T, d] each, the first two turned."""
    starts = None if angles.packing is None else angles.packing.starts
    query, key, value = _SplitAndTurn.apply(qkv, angles.class_angle, angles.cos, angles.sin, starts)
    return query, key, value


class _SplitAndTurn(torch.autograd.Function):
    """One pass from the fused layout to the attention's, and one pass back.

    Autograd's own way keeps the unturned copies, pads each slice's gradient to the full projection and
    adds them up, and sums a gradient over the whole batch for angles that never learn.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, class_angle: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, ...]:
        images, tokens, heads, _, width = qkv.shape
        if qkv.is_cuda:
            # A GPU's attention lays out what it gives like its queries: by tokens, as the next linear wants.
            split = qkv.new_empty(3, images, tokens, heads, width).transpose(2, 3)
        else:
            split = qkv.new_empty(3, images, heads, tokens, width)
        fused = qkv.permute(3, 0, 2, 1, 4)
        _turn_into(split[:2], fused[:2], cos, sin)
        split[2].copy_(fused[2])
        ctx.save_for_backward(_class_tokens(split[:2], starts), cos, sin, starts)
        return split.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        class_token, cos, sin, starts = ctx.saved_tensors
        images, heads, tokens, width = grads[0].shape
        grad = grads[0].new_empty(images, tokens, heads, 3, width)
        split = grad.permute(3, 0, 2, 1, 4)
        for part in (0, 1):
            _turn_into(split[part], grads[part], cos, sin, back=True)
        split[2].copy_(grads[2])
        # d(turned pair)/d(angle) is the turned pair itself, turned by a right angle.
        first, second = class_token.to(cos.dtype).chunk(2, dim=-1)
        grad_class = torch.stack([_class_tokens(own, starts) for own in grads[:2]])
        grad_first, grad_second = grad_class.to(cos.dtype).chunk(2, dim=-1)
        grad_angle = (grad_second * first - grad_first * second).sum((0, 1, 2, 3))
        return grad, grad_angle, None, None, None


def _class_tokens(x: Tensor, starts: Tensor | None) -> Tensor:
    """The class tokens of [..., T, d]: the first token, or those at the starts of several images."""
    return x[..., :1, :] if starts is None else x.index_select(-2, starts)


def _turn_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    # Whole heads first: a product along 64 numbers takes less than two along 32.
    torch.mul(x, cos, out=out)
    out_first.addcmul_(second, sin, value=1 if back else -1)
    out_second.addcmul_(first, sin, value=-1 if back else 1)
