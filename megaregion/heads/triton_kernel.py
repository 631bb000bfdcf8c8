"""The exponentials of a tile in one pass over it, for GPUs; see exponentials.py for what it computes.

One program takes one row and walks over its columns, so sums have a fixed order and need no atomics.

Shapes: r rows of a block, c classes of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Columns that a program holds at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _exponentiate_row(  # type: ignore[no-untyped-def]
    products,
    inverse,
    shift,
    mass,
    best,
    columns,
    stride,
    HAS_SHIFT: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    line = products + row.to(tl.int64) * stride
    offset = tl.load(shift + row) if HAS_SHIFT else 0.0
    total = tl.zeros([BLOCK], tl.float32)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        scale = tl.load(inverse + column, mask=inside, other=1.0)
        score = tl.load(line + column, mask=inside, other=float("-inf")) * scale
        top = tl.maximum(top, score)
        power = tl.exp2(score - offset)
        total += power
        tl.store(line + column, power * scale, mask=inside)
    tl.store(mass + row, tl.sum(total, 0))
    tl.store(best + row, tl.max(top, 0))


def exponentiate_fused(products: Tensor, inverse: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """As ``exponentials.exponentiate``, for fp32 tiles whose rows are contiguous."""
    mass, best = (torch.empty_like(products[:, 0]) for _ in range(2))
    kernel: Any = _exponentiate_row[(len(products),)]
    kernel(
        products,
        inverse,
        products if shift is None else shift,
        mass,
        best,
        products.shape[1],
        products.stride(0),
        HAS_SHIFT=shift is not None,
        BLOCK=COLUMNS,
    )
    return mass, best
