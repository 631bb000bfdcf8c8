"""What stands between products in one pass, for GPUs; rotary.py and layers.py say what is computed.

Rotary positions: a program takes some neighbouring tokens of all heads, reads their queries, keys and values
where the projection wrote them, turns the first two, and writes all three where attention reads; or back.
Norms on the way back: a program takes every so many rows, and adds up its share of the weight's gradient.

Shapes: B images, T tokens, H heads, d head width, R rows, D width.
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


@triton.jit  # type: ignore[untyped-decorator]
def _norm_back(  # type: ignore[no-untyped-def]
    grad_normed, passed, x, means, factors, weight, grad, shares, rows,
    PASSED: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    of_weight, of_bias = tl.zeros((PADDED,), tl.float32), tl.zeros((PADDED,), tl.float32)
    of_added = tl.zeros((PADDED,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * WIDTH + column
        factor = tl.load(factors + row)
        own = tl.load(grad_normed + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (value - tl.load(means + row)) * factor, 0.0)
        of_weight += own * normed
        of_bias += own
        own *= scale
        back = factor * (own - (tl.sum(own, 0) + normed * tl.sum(own * normed, 0)) / WIDTH)
        if PASSED:
            back += tl.load(passed + place, mask=inside, other=0.0).to(tl.float32)
        of_added += back
        tl.store(grad + place, back, mask=inside)
    share = shares + tl.program_id(0) * 3 * WIDTH + column
    tl.store(share, of_weight, mask=inside)
    tl.store(share + WIDTH, of_bias, mask=inside)
    tl.store(share + 2 * WIDTH, of_added, mask=inside)


def norm_back(
    grad_normed: Tensor,
    passed: Tensor | None,
    x: Tensor,
    mean: Tensor,
    factor: Tensor,
    weight: Tensor,
    programs: int,
) -> tuple[Tensor, Tensor]:
    """Gradient of a norm's operand [R, D] with what has ``passed`` the norm by, and shares of column sums.

    ``mean`` and ``factor`` (one over the deviation) are each row's, [R, 1] float32. The shares of weight,
    bias and a bias of the operand, [programs, 3, D] float32, are to be added up: no atomics, a fixed order.
    """
    (rows, width), grad_normed = x.shape, grad_normed.contiguous()
    passed = None if passed is None else passed.contiguous()
    grad, shares = torch.empty_like(grad_normed), x.new_empty(programs, 3, width, dtype=torch.float32)
    kernel: Any = _norm_back[(programs,)]
    kernel(
        grad_normed, passed, x, mean, factor, weight, grad, shares, rows, PASSED=passed is not None,
        WIDTH=width, PADDED=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return grad, shares


@triton.jit  # type: ignore[untyped-decorator]
def _active_back(  # type: ignore[no-untyped-def]
    grad_active, hidden, grad, shares, rows,
    QUICK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, total = column < WIDTH, tl.zeros((COLUMNS,), tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * WIDTH + column
        own = tl.load(grad_active + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        if QUICK:
            gate = tl.sigmoid(1.702 * x)
            own *= gate * (1 + 1.702 * x * (1 - gate))
        else:
            # The normal distribution and its density.
            own *= 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        total += own
        tl.store(grad + place, own, mask=inside)
    tl.store(shares + tl.program_id(0) * WIDTH + column, total, mask=inside)


def active_back(grad_active: Tensor, hidden: Tensor, quick: bool, programs: int) -> tuple[Tensor, Tensor]:
    """Gradient of GELU's (or the quick one's) operand [R, M], and shares of its sums, [programs, M]."""
    (rows, width), grad_active = hidden.shape, grad_active.contiguous()
    columns = min(1024, triton.next_power_of_2(width))
    grad, shares = torch.empty_like(grad_active), hidden.new_empty(programs, width, dtype=torch.float32)
    kernel: Any = _active_back[(programs, triton.cdiv(width, columns))]
    kernel(grad_active, hidden, grad, shares, rows, QUICK=quick, WIDTH=width, COLUMNS=columns)
    return grad, shares
