"""The streaming loss of one draw: row losses and gradients, and never the matrix of scores.

For a block of rows, tile after tile of classes: product, exponential, row sums. When the row sums of
all ranks are known, the same tiles - kept where memory allows, else computed again - become the
gradient of features and centers. The gradient is made here, in the forward pass, since loss and
gradient need the same exponentials and only a factor of the whole loss comes later: three matrix
products per tile instead of the four of a backward pass that recomputes.

Cosines are bounded, so exp(s) of scales up to 70 fits fp32 with room for all sums: no running maximum.
Greater scales take one more sweep for the rows' maxima. The logarithm of the scale's base is folded into
the features, since exp2 costs a third of exp.

Shapes: R rows of the draw, r rows of a block, C classes of the draw on this rank, c classes of a tile,
E embedding width, T positives of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadConfig
from megaregion.heads.losses import row_terms
from megaregion.heads.margin import apply_margin
from megaregion.heads.scratch import Scratch
from megaregion.heads.tiles import TileBuffer, TilePlan, own_columns, plan_tiles

LOG2E = math.log2(math.e)
BOUNDED_SCALE = 70.0
"""Scale up to which exp(s), for every |s| <= scale and a sum over 1e7 classes, is a normal fp32 number."""


class DrawSums(NamedTuple):
    """What a draw's rows add up to; the same on every rank."""

    loss: Tensor
    """Sum of the row losses, 0-d."""
    cosines: Tensor
    """Positives' cosines, 0 where there is none, [R, T]."""
    best: Tensor
    """Each row's greatest cosine with a negative of this rank's classes, [R]."""


class _Swept(NamedTuple):
    """A block whose row sums are on their way."""

    rows: slice
    buffer: TileBuffer
    parts: Tensor
    """Positives' cosines and the sum over negatives, [r, T + 1]."""
    work: dist.Work | None


class DrawStream:
    """The scores of one draw, seen one tile at a time."""

    def __init__(
        self,
        config: HeadConfig,
        features: Tensor,
        centers: Tensor,
        columns: Tensor,
        valid: Tensor,
        group: dist.ProcessGroup,
        chunk_bytes: int,
        scratch: Scratch,
    ) -> None:
        """Take the parts of a draw.

        Args:
            config: Loss, margin and scale.
            features: Unit rows, [R, E].
            centers: Centers of the draw on this rank, of any length, [C, E].
            columns: Column of each positive among them, -1 where it is not on this rank, int64 [R, T].
            valid: Which positives there are on any rank, bool [R, T].
            group: All ranks.
            chunk_bytes: Memory for scores.
            scratch: Where the scores are kept.
        """
        self._config, self._group, self._scratch = config, group, scratch
        self._features = features * (config.scale * LOG2E)
        self._centers, self._inverse = centers, inverse_lengths(centers)
        self._columns, self._valid = columns, valid
        # While one block's sums travel the next is swept: two buffers share the budget.
        self._in_flight = 2 if group.size() > 1 else 1
        self._plan: TilePlan = plan_tiles(
            len(features), len(centers), features.element_size(), chunk_bytes // self._in_flight
        )
        self._best = features.new_full((len(features),), float("-inf"))
        self._shift = self._row_maxima() if config.scale > BOUNDED_SCALE else None

    def run(self, by_features: Tensor | None, by_unit_centers: Tensor | None) -> DrawSums:
        """Sum the losses and, where room for them is given, compute the gradients.

        Args:
            by_features: Receives this rank's part of the gradient of the unit rows, [R, E].
            by_unit_centers: Gradient of the unit centers over the centers' lengths, is added to, [C, E].
        """
        total = self._features.new_zeros((), dtype=torch.float64)
        cosines = torch.zeros_like(self._columns, dtype=self._features.dtype)
        buffers = [TileBuffer(self._plan, self._scratch, f"tiles {n}") for n in range(self._in_flight)]
        waiting: list[_Swept] = []
        for number, rows in enumerate(self._plan.blocks()):
            waiting.append(self._sweep(rows, buffers[number % self._in_flight]))
            if len(waiting) == self._in_flight:
                total += self._finish(waiting.pop(0), cosines, by_features, by_unit_centers)
        for swept in waiting:
            total += self._finish(swept, cosines, by_features, by_unit_centers)
        return DrawSums(total, cosines, self._best / (self._config.scale * LOG2E))

    def _sweep(self, rows: slice, buffer: TileBuffer) -> _Swept:
        """Row sums of a block over this rank's classes; their sum over ranks is under way on return."""
        features = self._features[rows]
        parts = features.new_zeros((len(features), self._columns.shape[1] + 1))
        best = self._best[rows]
        for number, tile in enumerate(self._plan.tiles()):
            scores = buffer.tile(number, len(features), tile.stop - tile.start)
            self._score(features, tile, scores)
            column, inside = own_columns(self._columns[rows], tile)
            parts[:, :-1] += torch.where(inside, scores.gather(1, column), 0.0)
            self._leave_out(scores, column, inside)
            torch.maximum(best, scores.amax(1), out=best)
            parts[:, -1] += self._exponentiate(scores, rows).sum(1)
            scores.mul_(self._inverse[tile])
        work = dist.all_reduce(parts, group=self._group, async_op=True)
        return _Swept(rows, buffer, parts, work)

    def _finish(
        self, swept: _Swept, cosines: Tensor, by_features: Tensor | None, by_unit_centers: Tensor | None
    ) -> Tensor:
        """Losses of a swept block, and the gradients from its tiles."""
        if swept.work is not None:
            swept.work.wait()
        rows, config = swept.rows, self._config
        cosine = swept.parts[:, :-1] / (config.scale * LOG2E)
        cosines[rows] = cosine
        with_margin, slope = apply_margin(cosine, config.margin_kind, config.margin)
        shift = cosine.new_zeros(()) if self._shift is None else self._shift[rows]
        terms = row_terms(
            config.loss, with_margin * config.scale, self._valid[rows], swept.parts[:, -1], shift
        )
        if by_features is not None and by_unit_centers is not None:
            by_features[rows] = self._pull(
                swept, terms.by_negative[:, None], terms.by_positive * slope, by_unit_centers
            )
        return terms.loss.sum(dtype=torch.float64)

    def _pull(
        self, swept: _Swept, by_negative: Tensor, by_positive: Tensor, by_unit_centers: Tensor
    ) -> Tensor:
        """Turn a block's exponentials into gradients; return that of its rows, [r, E]."""
        features = self._features[swept.rows]
        by_rows = torch.zeros_like(features)
        for number, tile in enumerate(self._plan.tiles()):
            scores = swept.buffer.tile(number, len(features), tile.stop - tile.start)
            column, inside = own_columns(self._columns[swept.rows], tile)
            if number >= self._plan.kept:
                self._score(features, tile, scores)
                self._leave_out(scores, column, inside)
                self._exponentiate(scores, swept.rows).mul_(self._inverse[tile])
            scores.mul_(by_negative)
            weighted = by_positive * self._inverse[tile][column]
            scores.scatter_add_(1, column, torch.where(inside, weighted, 0.0))
            by_rows.addmm_(scores, self._centers[tile])
            by_unit_centers[tile].addmm_(scores.T, features, alpha=1 / LOG2E)
        return by_rows.mul_(self._config.scale)

    def _score(self, features: Tensor, tile: slice, scores: Tensor) -> None:
        """Write the scores of a tile, in units of log 2, [r, c]."""
        torch.mm(features, self._centers[tile].T, out=scores)
        scores.mul_(self._inverse[tile])

    @staticmethod
    def _leave_out(scores: Tensor, column: Tensor, inside: Tensor) -> None:
        """Take the rows' own positives out of a tile: they are no negatives."""
        # Adding, where padding adds 0 to column 0, needs no list of pairs and so no size known to the host.
        scores.scatter_add_(1, column, torch.where(inside, float("-inf"), 0.0).to(scores.dtype))

    def _exponentiate(self, scores: Tensor, rows: slice) -> Tensor:
        if self._shift is not None:
            scores.sub_(self._shift[rows, None] * LOG2E)
        return scores.exp2_()

    def _row_maxima(self) -> Tensor:
        """What to subtract from each row's scores when exp alone could overflow, [R].

        The greatest negative; not below 0 for the separated loss, whose log(1 + ...) brings the 0 itself.
        """
        buffer = TileBuffer(self._plan, self._scratch, "tiles 0")
        top = torch.full_like(self._best, float("-inf"))
        for rows in self._plan.blocks():
            features = self._features[rows]
            for number, tile in enumerate(self._plan.tiles()):
                scores = buffer.tile(number, len(features), tile.stop - tile.start)
                self._score(features, tile, scores)
                self._leave_out(scores, *own_columns(self._columns[rows], tile))
                top[rows] = torch.maximum(top[rows], scores.amax(1))
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self._group)
        top /= LOG2E
        floor = 0.0 if self._config.loss == "separated" else -self._config.scale
        return top.clamp_min(floor)


def inverse_lengths(centers: Tensor) -> Tensor:
    """1 / length of each center, [C]; 1 for a center shorter than 1e-8, which thus scores 0 and can grow."""
    lengths = torch.linalg.vector_norm(centers, dim=1)
    return torch.where(lengths > 1e-8, lengths.reciprocal(), 1.0)
