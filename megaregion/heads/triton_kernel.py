"""The exponentials of a tile in one pass over it, for GPUs; ``tiles.exponentiate`` says what it computes.

A program takes some neighbouring rows and walks over a span of classes; its sums go to a line of their own
and the lines are added afterwards, so every sum has a fixed order and needs no atomics.

Shapes: r rows of a block, c classes of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CLASSES, SPAN = 64, 32, 512
"""Rows of a program, classes that it holds at a time, classes that it walks over."""


@triton.jit  # type: ignore[untyped-decorator]
def _exponentiate_span(  # type: ignore[no-untyped-def]
    products,
    inverse,
    shift,
    sum_exp,
    best,
    rows,
    classes,
    HAS_INVERSE: tl.constexpr,  # noqa: N803
    HAS_SHIFT: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803
):
    span = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    offset = tl.load(shift + row, mask=there, other=0.0) if HAS_SHIFT else tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, SPAN, CLASSES):
        line = span * SPAN + start + tl.arange(0, CLASSES)
        inside = (line < classes)[:, None] & there[None, :]
        place = products + line.to(tl.int64)[:, None] * rows + row[None, :]
        if HAS_INVERSE:
            scale = tl.load(inverse + line, mask=line < classes, other=1.0)[:, None]
        else:
            scale = tl.full([CLASSES], 1.0, tl.float32)[:, None]
        score = tl.load(place, mask=inside, other=float("-inf")) * scale
        top = tl.maximum(top, tl.max(score, 0))
        power = tl.exp2(score - offset[None, :])
        total += tl.sum(power, 0)
        tl.store(place, power * scale, mask=inside)
    tl.store(sum_exp + span * rows + row, total, mask=there)
    tl.store(best + span * rows + row, top, mask=there)


def exponentiate_fused(
    products: Tensor, inverse: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ``tiles.exponentiate``, for contiguous fp32 tiles."""
    classes, rows = products.shape
    spans = triton.cdiv(classes, SPAN)
    sum_exp, best = (torch.empty((spans, rows), device=products.device) for _ in range(2))
    kernel: Any = _exponentiate_span[(triton.cdiv(rows, ROWS), spans)]
    kernel(
        products,
        products if inverse is None else inverse,
        products if shift is None else shift,
        sum_exp,
        best,
        rows,
        classes,
        HAS_INVERSE=inverse is not None,
        HAS_SHIFT=shift is not None,
        ROWS=ROWS,
        CLASSES=CLASSES,
        SPAN=SPAN,
    )
    return sum_exp.sum(0), best.amax(0)
