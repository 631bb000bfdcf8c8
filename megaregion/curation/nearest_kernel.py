"""The nearest of all centers in one launch, for GPUs: no score leaves the program that made it.

A program takes some vectors past all centers, tile by tile, and keeps of each vector the greatest score,
where it lies, and the second greatest. What kmeans.py does with plain products writes every score and reads
it four times.

Shapes: n vectors and K centers of C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CENTERS, DEPTH = 128, 64
"""Centers of a tile, and channels that are multiplied at once."""
WARPS, STAGES = 8, 3


@triton.jit  # type: ignore[untyped-decorator]
def scan_tiles(  # type: ignore[no-untyped-def]
    vectors, centers, but, labels, best, second, rows, count, channels, outs,
    ROWS: tl.constexpr,  # noqa: N803
    CENTERS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Writes of some vectors, ROWS for each program, what :func:`scan_all` gives of all."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    # Places in a tile have 32 bits, and only where it begins has 64: so few registers are taken.
    some_start = vectors + tl.program_id(0).to(tl.int64) * ROWS * channels
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    runner_up, place = greatest, tl.zeros((ROWS,), tl.int32)
    tile = tl.arange(0, CENTERS)
    for first in range(0, count, CENTERS):
        column = first + tile
        known = column < count
        others_start = centers + tl.cast(first, tl.int64) * channels
        scores = tl.zeros((ROWS, CENTERS), tl.float32)
        for start in range(0, channels, DEPTH):
            channel = start + tl.arange(0, DEPTH)
            some = tl.load(
                some_start + (tl.arange(0, ROWS)[:, None] * channels + channel[None, :]),
                mask=inside[:, None] & (channel < channels)[None, :], other=0.0,
            )  # fmt: skip
            others = tl.load(
                others_start + (tile[None, :] * channels + channel[:, None]),
                mask=known[None, :] & (channel < channels)[:, None], other=0.0,
            )  # fmt: skip
            scores = tl.dot(some, others, scores)
        scores = tl.where(known[None, :], scores, float("-inf"))
        for number in range(outs):
            out = tl.load(but + row.to(tl.int64) * outs + number, mask=inside, other=-1)
            scores = tl.where(column[None, :] == out[:, None], float("-inf"), scores)
        # Of equal ones the first.
        here, at = tl.max(scores, 1), tl.argmax(scores, 1)
        rest = tl.max(tl.where(tile[None, :] == at[:, None], float("-inf"), scores), 1)
        runner_up = tl.maximum(tl.maximum(runner_up, rest), tl.minimum(greatest, here))
        place = tl.where(here > greatest, first + at, place)
        greatest = tl.maximum(greatest, here)
    tl.store(labels + row, place.to(tl.int64), mask=inside)
    tl.store(best + row, greatest, mask=inside)
    tl.store(second + row, runner_up, mask=inside)


def tile_rows(capability: int) -> int:
    """Vectors of a program by the first number of what a GPU can do: more would spill on Blackwell."""
    return 64 if capability >= 10 else 128


def scan_all(vectors: Tensor, centers: Tensor, but: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of each vector the nearest center, int64 [n], its score and the second greatest, float32 [n].

    With ``but``, int64 [n] or [n, m], the centers that each vector may not choose.
    """
    found = _empty(vectors)
    rows, outs = len(vectors), 0 if but is None else but[:1].numel()
    if rows:
        height = tile_rows(torch.cuda.get_device_capability(vectors.device)[0] if vectors.is_cuda else 0)
        operands = vectors.contiguous(), centers.contiguous(), None if but is None else but.contiguous()
        scan_tiles[(triton.cdiv(rows, height),)](
            *operands, *found, rows, len(centers), vectors.shape[1], outs,
            ROWS=height, CENTERS=CENTERS, DEPTH=DEPTH, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return found


def _empty(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    best = torch.empty(len(vectors), device=vectors.device)
    return labels, best, torch.empty_like(best)


scan_on_gpu = torch.library.custom_op("megaregion::scan_all", scan_all, mutates_args=())


@scan_on_gpu.register_fake
def _(vectors: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(vectors)
