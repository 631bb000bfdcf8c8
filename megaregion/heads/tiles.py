"""How a matrix of scores is cut: blocks of rows, tiles of classes, and the buffer that holds them.

A tile lies in memory with a class per line and the block's rows side by side: processors multiply
(centers x rows) markedly faster than (rows x centers) when the rows are few.

A block's rows meet all classes of the draw before their sums are known, and once more for the gradient.
Tiles that fit the memory budget are kept between the two; the others are computed again. Tall blocks
make efficient matrix products, so a block is never shorter than ``MIN_ROWS``: with a small budget it is
tiles that give way, not rows.

Shapes: R rows, C classes of a draw on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megaregion.heads.portions import SCORES
from megaregion.heads.scratch import Scratch

MIN_ROWS = 128
"""Rows below which a matrix product spends its time on moving centers."""


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
    """Cut scores so that kept tiles and one more fit a budget.

    Args:
        rows: R.
        classes: C.
        typical_classes: About C, and the same on every rank: all ranks must cut the same blocks of rows,
            since their sums meet.
        itemsize: Bytes of a score.
        budget: Bytes for scores.
        device: processor or gpu.
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
    """Positives that stand inside a tile.

    Args:
        columns: Where each positive stands among the draw's classes, -1 if not on this rank, [rows, T].
        tile: Slice of classes.

    Returns:
        Line within the tile (0 where it is elsewhere) and whether it is there, both [T, rows].
    """
    lines = columns.T
    inside = (lines >= tile.start) & (lines < tile.stop)
    return (lines - tile.start).masked_fill_(~inside, 0), inside
