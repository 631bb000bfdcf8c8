"""2D rotary positions: queries and keys turn by angles of their patch's row and column.

A head's width d is d/2 pairs (i, i + d/2). The first half of the pairs turns by the row, the second
by the column, at frequencies theta^(-2i / (d/2)); the class token turns by a learned angle, registers do not
turn. The layout is that of transformers' ``MLCDVisionModel``.

Shapes: B images, P patches, K registers, T = 1 + K + P image tokens (class token first), H heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Packing(NamedTuple):
    """How the images of a batch share one sequence: each image's tokens behind those of the image before.

    Numbers of tokens are int32 and on the device; they are sent there once a pass. In *columns* every image
    has as many places as the longest image has tokens.
    """

    lengths: tuple[int, ...]
    """Tokens of each image."""
    boundaries: Tensor
    """Where each image starts and the last one ends, [images + 1]."""
    slots: Tensor
    """Number of the image whose class token a token is, [S], -1 for others."""
    patches: Tensor
    """Where each patch stands, int64 [P]."""
    columns: Tensor
    """The token in each image's columns, [images x columns]; the image's class token where it has no more."""
    places: Tensor
    """Each token's place among the columns, [S]."""
    registers: Tensor | None = None
    """Where each image's registers stand, int64 [images K]; None without any."""

    @property
    def starts(self) -> Tensor:
        """Where each image's class token stands, [images]."""
        return self.boundaries[:-1]

    def spread(self, patches: Tensor, own: Tensor, registers: Tensor | None) -> Tensor:
        """All images' patches, [P, ...], in one sequence [S, ...], behind ``own`` and registers [K, ...]."""
        sequence = own.expand(len(self.slots), *own.shape).index_copy(0, self.patches, patches)
        if self.registers is None or registers is None:
            return sequence
        each = registers.expand(len(self.lengths), *registers.shape).flatten(0, 1)
        return sequence.index_copy(0, self.registers, each)

    def in_columns(self, rows: Tensor) -> Tensor:
        """Rows of a sequence, [S, ...], image by image, [images, columns, ...]; fillers pass nothing back."""
        spread: Tensor = _Spread.apply(rows, self.columns, self.places)
        return spread.unflatten(0, (len(self.lengths), -1))


class _Spread(torch.autograd.Function):
    """Rows of a sequence, some of them more than once; the gradient of a row is that of one place.

    The others are masked. torch would add up the gradients of all, row by row.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


def pack(grids: Sequence[tuple[int, int]], device: torch.device, registers: int = 0) -> Packing:
    """Lay images of so many rows and columns of patches, and their registers, behind each other."""
    lengths = [1 + registers + rows * columns for rows, columns in grids]
    ends, longest = np.cumsum(lengths), max(lengths)
    starts = ends - lengths
    slots = np.full(ends[-1], -1)
    slots[starts] = np.arange(len(lengths))
    own = (starts[:, None] + np.arange(1, 1 + registers)).ravel()
    others = slots < 0
    others[own] = False
    column = np.arange(longest)
    there = column < np.array(lengths)[:, None]
    parts = (
        np.append(0, ends), slots, np.flatnonzero(others),
        (starts[:, None] + np.where(there, column, 0)).ravel(), np.flatnonzero(there), own,
    )  # fmt: skip
    # Once a pass, and without waiting for a GPU: a list of indices in each block would wait for it each time.
    numbers = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device, non_blocking=True)
    boundaries, slots, patches, columns, places, own = numbers.split([len(part) for part in parts])
    spared = own.long() if registers else None
    return Packing(tuple(lengths), boundaries, slots, patches.long(), columns, places, spared)


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

    def class_tokens(self, image: Tensor) -> Tensor:
        """Each image's class token, [images, 1, D], from all tokens, [B, T, D]."""
        packing = self.packing
        return image[:, :1] if packing is None else image[0].index_select(0, packing.starts)[:, None]

    def of_class_tokens(self, count: int) -> Rotation:
        """The angles of so many class tokens, each the only token of a sequence of its own."""
        return Rotation(self.class_angle, self.cos[:1], self.sin[:1], count)


def packed_rotation(
    class_angle: Tensor, grids: Sequence[tuple[int, int]], theta: float, registers: int = 0
) -> Rotation:
    """The angles of images in one sequence, each behind its class token; grids are (rows, columns)."""
    class_angle = class_angle.float()
    packing, fixed = pack(grids, class_angle.device, registers), _leading(class_angle, registers)
    tables = [_patch_table(*grid, len(class_angle), theta, fixed.device) for grid in grids]
    cosines, sines = (torch.cat(parts) for parts in zip(*tables, strict=True))
    own_cos, own_sin = fixed.cos(), fixed.sin()
    cos = packing.spread(cosines, own_cos[0], own_cos[1:])
    sin = packing.spread(sines, own_sin[0], own_sin[1:])
    return Rotation(class_angle, torch.cat((cos, cos), dim=-1), sin, 1, packing)


def rotation(
    class_angle: Tensor, rows: int, columns: int, theta: float, images: int, registers: int = 0
) -> Rotation:
    """The angles of B images of one size: of class token, registers and rows * columns patches, row by row.

    ``class_angle`` is the learned one, [d/2]; ``theta`` the base of the frequencies.
    """
    class_angle = class_angle.float()
    cos, sin = _patch_table(rows, columns, class_angle.shape[-1], theta, class_angle.device)
    fixed = _leading(class_angle, registers)
    cos = torch.cat((fixed.cos(), cos))
    return Rotation(class_angle, torch.cat((cos, cos), dim=-1), torch.cat((fixed.sin(), sin)), images)


def _leading(class_angle: Tensor, registers: int) -> Tensor:
    """Angles of class token and registers, [1 + K, d/2]; constant to autograd."""
    fixed = class_angle.detach()[None]
    return F.pad(fixed, (0, 0, 0, registers)) if registers else fixed


@lru_cache(maxsize=256)
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


def split_and_turn(qkv: Tensor, angles: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection [B, T, H, 3, d] into q, k, v, [B, H, T, d] each, the first two turned."""
    packing = angles.packing
    starts, slots = (None, None) if packing is None else (packing.starts, packing.slots)
    query, key, value = _split(qkv, angles.class_angle, angles.cos, angles.sin, starts, slots)
    return query, key, value


# One pass from the fused layout to the attention's, and one pass back. Autograd's own way keeps the unturned
# copies, pads each slice's gradient to the full projection and adds them up, and sums a gradient over the
# whole batch for angles that never learn. As operators of their own they stay whole in a compiled block.


@torch.library.custom_op("megaregion::split_and_turn", mutates_args=())
def _split(
    qkv: Tensor, class_angle: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    split, fused = _empty_split(qkv), qkv.permute(3, 0, 2, 1, 4)
    for part in (0, 1):
        _turn_into(split[part], fused[part], cos, sin)
    split[2].copy_(fused[2])
    return split


@torch.library.custom_op("megaregion::join_and_turn_back", mutates_args=())
def _join(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    class_query: Tensor,
    class_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # A GPU without Triton waits here for their number.
    starts = None if slots is None else (slots >= 0).nonzero()[:, 0]
    grad = _empty_fused(grad_query)
    split = grad.permute(3, 0, 2, 1, 4)
    for part, own in enumerate((grad_query, grad_key)):
        _turn_into(split[part], own, cos, sin, back=True)
    split[2].copy_(grad_value)
    # d(turned pair)/d(angle) is the turned pair itself, turned by a right angle.
    first, second = torch.stack((class_query, class_key)).to(cos.dtype).chunk(2, dim=-1)
    grad_class = torch.stack([_class_tokens(own, starts) for own in (grad_query, grad_key)])
    grad_first, grad_second = grad_class.to(cos.dtype).chunk(2, dim=-1)
    return grad, (grad_second * first - grad_first * second).sum((0, 1, 2, 3))


if find_spec("triton") is not None:

    @_split.register_kernel("cuda")
    def _(qkv: Tensor, _: Tensor, cos: Tensor, sin: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
        from megaregion.models.kernels import split_and_turn

        split = _empty_split(qkv)
        split_and_turn(qkv.contiguous(), split, cos, sin)
        return split

    @_join.register_kernel("cuda")
    def _(*operands: Any) -> tuple[Tensor, Tensor]:
        from megaregion.models.kernels import join_and_turn_back

        grads, leading, (cos, sin, slots) = operands[:3], operands[3:5], operands[5:]
        fused = _empty_fused(grads[0])
        return fused, join_and_turn_back(fused, grads, leading, cos, sin, slots)


@_split.register_fake
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_split(qkv)


@_join.register_fake
def _(*operands: Any) -> tuple[Tensor, Tensor]:
    sin = operands[6]
    return _empty_fused(operands[0]), sin.new_empty(sin.shape[-1])


def _empty_split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, heads, _, width = qkv.shape
    if qkv.is_cuda:
        # A GPU's attention lays out what it gives like its queries: by tokens, as the next linear wants.
        split = [qkv.new_empty(images, tokens, heads, width).transpose(1, 2) for _ in range(3)]
    else:
        split = [qkv.new_empty(images, heads, tokens, width) for _ in range(3)]
    return split[0], split[1], split[2]


def _empty_fused(query: Tensor) -> Tensor:
    images, heads, tokens, width = query.shape
    return query.new_empty(images, tokens, heads, 3, width)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, cos, sin, starts, slots = inputs
    leading = [_class_tokens(part, starts) for part in output[:2]]
    ctx.save_for_backward(*leading, cos, sin, slots)


def _back(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_angle = _join(*grads, *ctx.saved_tensors)
    return grad, grad_angle, None, None, None, None


_split.register_autograd(_back, setup_context=_keep)


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
