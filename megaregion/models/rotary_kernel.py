"""Rotary positions in one pass over the fused projection each way, for GPUs; rotary.py says what is computed.

A program takes some neighbouring tokens of all heads: it reads their queries, keys and values where the
projection wrote them, turns the first two, and writes all three where attention reads them; or the way back.

Shapes: B images, T tokens, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 512
"""Pairs of a program: 4 a thread of 4 warps, few enough for its registers."""


@triton.jit  # type: ignore[untyped-decorator]
def _pass(  # type: ignore[no-untyped-def]
    fused,
    query, query_image, query_token, query_head,
    key, key_image, key_token, key_head,
    value, value_image, value_token, value_head,
    cos, sin, rows, tokens, slots, grad_angle,
    class_query, class_query_slot, class_query_head,
    class_key, class_key_slot, class_key_head,
    BACK: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
    HEADS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    PADDED_HEADS: tl.constexpr,  # noqa: N803
    PADDED_HALF: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    head = tl.arange(0, PADDED_HEADS)[None, :, None]
    pair = tl.arange(0, PADDED_HALF)[None, None, :]
    inside = (row < rows) & (head < HEADS) & (pair < HALF)
    image, token = (row // tokens).to(tl.int64), row % tokens
    turns = (row < rows) & (pair < HALF)
    # Both halves of a cosine are equal.
    cosine = tl.load(cos + token * 2 * HALF + pair, mask=turns, other=0.0)
    sine = tl.load(sin + token * HALF + pair, mask=turns, other=0.0)
    joined = fused + (row.to(tl.int64) * HEADS + head) * (6 * HALF) + pair
    queries = query + image * query_image + token * query_token + head * query_head + pair
    keys = key + image * key_image + token * key_token + head * key_head + pair
    values = value + image * value_image + token * value_token + head * value_head + pair
    if BACK:
        _turn(queries, joined, cosine, -sine, inside, HALF)
        _turn(keys, joined + 2 * HALF, cosine, -sine, inside, HALF)
        _copy(values, joined + 4 * HALF, inside, HALF)
        if PACKED:
            slot = tl.load(slots + token, mask=row < rows, other=-1)
        else:
            slot = tl.where(token == 0, image, -1)
        leads = (row < rows) & (slot >= 0)
        # Few programs hold a class token.
        if tl.max(leads.to(tl.int32)) > 0:
            seen = inside & leads
            of_query = class_query + slot * class_query_slot + head * class_query_head + pair
            of_key = class_key + slot * class_key_slot + head * class_key_head + pair
            both = _moment(queries, of_query, seen, HALF) + _moment(keys, of_key, seen, HALF)
            place = grad_angle + slot * HALF + pair
            tl.store(place, tl.sum(both, 1, keep_dims=True), mask=turns & leads)
    else:
        _turn(joined, queries, cosine, sine, inside, HALF)
        _turn(joined + 2 * HALF, keys, cosine, sine, inside, HALF)
        _copy(joined + 4 * HALF, values, inside, HALF)


@triton.jit  # type: ignore[untyped-decorator]
def _turn(source, target, cosine, sine, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, first * cosine - second * sine, mask=inside)
    tl.store(target + HALF, second * cosine + first * sine, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _copy(source, target, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    tl.store(target, tl.load(source, mask=inside), mask=inside)
    tl.store(target + HALF, tl.load(source + HALF, mask=inside), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _moment(grads, turned, seen, HALF: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """What an angle's gradient is: the turned pair, turned by a right angle, times the gradient."""
    first = tl.load(turned, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(turned + HALF, mask=seen, other=0.0).to(tl.float32)
    grad_first = tl.load(grads, mask=seen, other=0.0).to(tl.float32)
    grad_second = tl.load(grads + HALF, mask=seen, other=0.0).to(tl.float32)
    return grad_second * first - grad_first * second


def split_and_turn(qkv: Tensor, split: Sequence[Tensor], cos: Tensor, sin: Tensor) -> None:
    """Write queries, keys and values, each [B, H, T, d], of a contiguous projection [B, T, H, 3, d]."""
    _launch(qkv, split, cos, sin)


def join_and_turn_back(
    fused: Tensor,
    grads: Sequence[Tensor],
    leading: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """Write the projection's gradient, [B, T, H, 3, d], and return that of the class tokens' angle, [d/2].

    Args:
        fused: Where it goes; contiguous.
        grads: Those of queries, keys and values, [B, H, T, d].
        leading: The class tokens' turned queries and keys.
        cos: Cosines of the tokens, [T, d].
        sin: Sines of the tokens, [T, d/2].
        slots: Where images share a sequence, the image whose class token a token is, or -1.
    """
    # One line an image, added up afterwards: no atomics, so the order is fixed.
    images = leading[0].shape[2] if slots is not None else len(leading[0])
    grad_angle = torch.empty((images, sin.shape[-1]), device=fused.device)
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
    _launch(fused, grads, cos, sin, grad_angle, leading, slots)
    return grad_angle.sum(0)


def _launch(
    fused: Tensor,
    split: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    grad_angle: Tensor | None = None,
    leading: Sequence[Tensor] = (),
    slots: Tensor | None = None,
) -> None:
    images, tokens, heads, _, width = fused.shape
    padded = triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)
    rows = max(1, PAIRS // (padded[0] * padded[1]))
    places: list[Any] = []
    for part in split:
        by_image, by_head, by_token, _ = part.stride()
        places += [part, by_image, by_token, by_head]
    classes: list[Any] = []
    for part in leading:
        classes += [part, part.stride(2 if slots is not None else 0), part.stride(1)]
    kernel: Any = _pass[(triton.cdiv(images * tokens, rows),)]
    kernel(
        fused, *places, cos, sin, images * tokens, tokens, slots, grad_angle, *(classes or [None, 0, 0] * 2),
        BACK=grad_angle is not None, PACKED=slots is not None, HEADS=heads, HALF=width // 2, ROWS=rows,
        PADDED_HEADS=padded[0], PADDED_HALF=padded[1],
    )  # fmt: skip
