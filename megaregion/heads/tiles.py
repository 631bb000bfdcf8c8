"""Tiles of scores: how a matrix is cut into them, where they lie, and what is computed on each.

A tile lies in memory with a class per line and the block's rows side by side: processors multiply (centers x
rows) markedly faster than (rows x centers) when the rows are few.

A block's rows meet all classes of the draw before their sums are known, and once more for the gradient. Tiles
that fit the memory budget are kept between the two; the others are computed again. Tall blocks make efficient
matrix products, so with a small budget it is tiles that give way, not rows.

Several passes follow each other over the same elements. On a processor a portion stays in its cache between
them; on a GPU it keeps the device busy for longer than its host takes to start the next pass.

Shapes: R rows, r rows of a block, C classes of a draw on this rank, c classes of a tile, K lines of a matrix,
E width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megaregion.processor import product, takes_onednn

MIN_ROWS = 128
"""Rows below which a matrix product spends its time on moving centers."""
BLOCK_ROWS = 128
"""Rows of a program of a GPU's kernels."""
ELEMENTS = {"processor": 1 << 17, "gpu": 1 << 22}
"""Elements of centers, gradients and moments."""
SCORES = {"processor": 1 << 19, "gpu": 1 << 23}
"""Scores of a tile, between two matrix products; a GPU's lie in its L2 cache (33 MB of an H100's 50)."""


def kind_of_device(matrix: Tensor) -> str:
    """Key of the tables above."""
    return "processor" if matrix.device.type == "cpu" else "gpu"


def lines_at_a_time(matrix: Tensor) -> int:
    """Lines of a matrix [K, E] that make a portion, at least 1."""
    return max(1, ELEMENTS[kind_of_device(matrix)] // max(1, matrix.shape[1]))


class Scratch:
    """Buffers by name. On a GPU, whose allocator keeps memory itself, each request is a fresh tensor."""

    def __init__(self, like: Tensor) -> None:
        """Buffers of the type and on the device of a tensor."""
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor; what was taken under the name before is overwritten."""
        size = math.prod(shape)
        if self._like.device.type != "cpu":
            return self._like.new_empty(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers.pop(name, None)  # first let go, then take: never both
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def rows(self, name: str, matrix: Tensor, chosen: Tensor) -> Tensor:
        """Copy chosen rows [n] of a matrix [K, E] into a buffer, [n, E]."""
        taken = self.take(name, (len(chosen), matrix.shape[1]))
        return torch.index_select(matrix, 0, chosen, out=taken)


@dataclass(frozen=True)
class TilePlan:
    """The cut of one draw's [R, C] scores."""

    rows: int
    """Rows of a block."""
    classes: int
    """Classes of a tile."""
    kept: int
    """Tiles kept from the sums to the gradient; the rest are computed twice."""
    total_rows: int
    total_classes: int

    def blocks(self) -> Iterator[slice]:
        """Slices of rows."""
        for start in range(0, self.total_rows, self.rows):
            yield slice(start, min(start + self.rows, self.total_rows))

    def tiles(self) -> Iterator[slice]:
        """Slices of classes."""
        for start in range(0, self.total_classes, self.classes):
            yield slice(start, min(start + self.classes, self.total_classes))


def plan_tiles(
    rows: int, classes: int, typical_classes: int, itemsize: int, budget: int, device: str
) -> TilePlan:
    """Cut [rows, classes] scores so that kept tiles and one more fit a budget, in bytes.

    ``typical_classes`` is about C, and the same on every rank: all ranks must cut the same blocks of rows,
    since their sums meet. ``device`` is processor or gpu.
    """
    scores = max(1, budget // itemsize)
    block = min(max(1, rows), max(MIN_ROWS, scores // max(1, typical_classes)))
    # Equal blocks: a short last one would be as slow as a full one.
    block = -(-rows // -(-rows // block)) if rows else 1
    tile = max(1, min(classes, SCORES[device] // block, scores // block))
    tiles = -(-classes // tile)
    fitting = scores // (block * tile)
    kept = tiles if fitting >= tiles else max(0, fitting - 1)
    return TilePlan(block, tile, kept, rows, classes)


class TileBuffer:
    """Memory for the tiles of one block, used again for the next."""

    def __init__(self, plan: TilePlan, scratch: Scratch, name: str) -> None:
        """Take room for the plan's tiles under a name of its own."""
        tiles = min(plan.kept + 1, -(-plan.total_classes // plan.classes))
        self._flat = scratch.take(name, (tiles * plan.rows * plan.classes,))
        self._plan = plan

    def tile(self, number: int, rows: int, span: slice) -> Tensor:
        """An uninitialised tile [classes, rows]; all tiles that are not kept share one place."""
        classes = span.stop - span.start
        start = min(number, self._plan.kept) * self._plan.rows * self._plan.classes
        return self._flat[start : start + rows * classes].view(classes, rows)


def own_places(columns: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Which positives, at ``columns`` [r, T] among the draw's classes (-1: not on this rank), a tile holds.

    Returns:
        Line within the tile (0 where it is elsewhere) and whether it is there, both [T, r].
    """
    lines = columns.T
    inside = (lines >= tile.start) & (lines < tile.stop)
    return (lines - tile.start).masked_fill_(~inside, 0), inside


class Products:
    """Products of matrices whose elements are first rounded to one type.

    On a GPU with a bf16 body the operands are bf16, the results fp32: features came as bf16 anyway, and a
    center rounded to bf16 moves a score by less than the noise of sampling. Elsewhere operands keep the type
    of the centers.
    """

    def __init__(self, operand: torch.dtype) -> None:
        """Round operands to ``operand``."""
        self._operand = operand

    def narrow(self, matrix: Tensor) -> Tensor:
        """A matrix as an operand; itself if it is one already."""
        return matrix.to(self._operand)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write ``left @ right`` of two operands into a wide matrix."""
        if out.is_cuda and left.dtype != out.dtype:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
        elif takes_onednn(out):
            # The library has a result of its own; copied while it is in the cache.
            out.copy_(product(left.float(), right.float().T))
        else:
            # A processor multiplies no narrow operands to wide results; widened ones round alike, for tests.
            torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)

    def add(self, out: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * left @ right`` of two operands to a wide matrix."""
        if out.is_cuda and left.dtype != out.dtype:
            torch.addmm(out, left, right, out_dtype=out.dtype, alpha=factor, out=out)
        elif takes_onednn(out):
            out.add_(product(left.float(), right.float().T), alpha=factor)
        else:
            out.addmm_(left.to(out.dtype), right.to(out.dtype), alpha=factor)


def exponentiate(products: Tensor, inverse: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace products by the exponentials of their scores, over the centers' lengths.

    Five passes over the tile, nearly free in the cache of a processor.

    ``products[j, i]`` becomes ``inverse[j] * 2 ** (products[j, i] * inverse[j] - shift[i])``.

    Args:
        products: Products of centers and rows in units of log 2, [c, r]; overwritten.
        inverse: 1 / length of each center, [c]; None for centers of length 1.
        shift: What to subtract from each row's scores, [r]; None for nothing.

    Returns:
        Each row's sum of ``2 ** (score - shift)`` and its greatest score, both [r].
    """
    if inverse is not None:
        products.mul_(inverse[:, None])
    best = products.amax(0)
    if shift is not None:
        products.sub_(shift)
    sum_exp = products.exp2_().sum(0)
    if inverse is not None:
        products.mul_(inverse[:, None])
    return sum_exp, best
