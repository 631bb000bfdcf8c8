"""The streaming loss: row losses and gradients of one draw after the other, and never the matrix of scores.

Both losses see the negatives only through Z = sum_n exp(s_n), so the derivative by a negative's score is
exp(s_n) times one factor of the row: nothing but an exponential stands between the matrix products.

For a block of rows, tile after tile of classes: product, exponential, row sums. When the row sums of all
ranks are known, the same tiles - kept where memory allows, else computed again - become the gradient of
features and centers. It is made here, in the forward pass, since loss and gradient need the same
exponentials: three matrix products per tile instead of the four of a backward pass that recomputes. Backward
adds the factor of the whole loss: at once to the rows' gradient, at the end of the step to the centers'.

Cosines are bounded, so exp(s) of scales up to 70 fits fp32 with room for all sums: no running maximum.
Greater scales take one more sweep for the rows' maxima. The logarithm of the scale's base is folded into the
features, since exp2 costs a third of exp.

Shapes: R rows of the draw, r rows of a block, C classes of the draw on this rank, c classes of a tile, E
embedding width, T positives of a row (padded).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaregion.config import HeadConfig, LossName, MarginName
from megaregion.heads.centers import ClassGradient, inverse_norms, normalise
from megaregion.heads.sampling import Draw, Targets
from megaregion.heads.tiles import (
    Products,
    Scratch,
    TileBuffer,
    exponentiate,
    kind_of_device,
    own_places,
    plan_tiles,
)

LOG2E = math.log2(math.e)
BOUNDED_SCALE = 70.0
"""Scale up to which exp(s), for every |s| <= scale and a sum over 1e7 classes, is a normal fp32 number."""


class RowTerms(NamedTuple):
    """Losses of rows and their derivatives."""

    loss: Tensor
    """Of each row, [R]."""
    grad_negative: Tensor
    """d loss / d s_n divided by exp(s_n - shift): one factor for all negatives of a row, [R]."""
    grad_positive: Tensor
    """d loss / d s_p for each positive, 0 where there is none, [R, T]."""


def row_terms(loss: LossName, scores: Tensor, valid: Tensor, sum_exp: Tensor, shift: Tensor) -> RowTerms:
    """Losses and derivatives of rows, in the type of ``sum_exp``.

    separated (RICE): ``log(1 + sum_p exp(-s_p)) + log(1 + sum_n exp(s_n))``.

    softmax (UNICOM, PartialFC): the mean over positives p of ``-s_p + log(exp(s_p) + sum_n exp(s_n))``. Each
    positive faces the negatives alone. The other form for several positives, ``-log(sum_p exp(s_p) / (sum_p
    exp(s_p) + sum_n exp(s_n)))``, is content when one token of a word is found and then leaves the others
    without gradient. With one positive the two are the same.

    Args:
        loss: separated or softmax.
        scores: Scaled positives' scores s_p with margin, [R, T].
        valid: Which of them are there, bool [R, T].
        sum_exp: sum_n exp(s_n - shift) over negatives, [R].
        shift: What was subtracted from the negatives' scores, [R] or 0-d.
    """
    log_sum_exp = sum_exp.log() + shift
    if loss == "separated":
        return _separated(scores, valid, sum_exp, log_sum_exp, shift)
    return _softmax(scores, valid, sum_exp, log_sum_exp, shift)


def _separated(
    scores: Tensor, valid: Tensor, sum_exp: Tensor, log_sum_exp: Tensor, shift: Tensor
) -> RowTerms:
    opposed = torch.where(valid, -scores, float("-inf"))
    zero = torch.zeros_like(sum_exp)
    positive = torch.logaddexp(zero, torch.logsumexp(opposed, 1))
    negative = torch.logaddexp(zero, log_sum_exp)
    grad_positive = -torch.exp(opposed - positive[:, None])
    return RowTerms(positive + negative, 1 / (sum_exp + torch.exp(-shift)), grad_positive)


def _softmax(scores: Tensor, valid: Tensor, sum_exp: Tensor, log_sum_exp: Tensor, shift: Tensor) -> RowTerms:
    share = valid.to(sum_exp.dtype) / valid.sum(1, keepdim=True).clamp_min(1)
    excess = log_sum_exp[:, None] - scores
    # excess = -inf (a row without negatives) costs nothing; softplus and sigmoid are 0 there.
    losses = torch.logaddexp(torch.zeros_like(excess), excess)
    grad_negative = share / (sum_exp[:, None] + torch.exp(scores - shift.expand_as(sum_exp)[:, None]))
    # Without negatives there is nothing to multiply; 1 / exp(s_p) alone could overflow.
    grad_negative = grad_negative.masked_fill(sum_exp[:, None] == 0, 0.0)
    return RowTerms((share * losses).sum(1), grad_negative.sum(1), -share * torch.sigmoid(excess))


def apply_margin(cosine: Tensor, kind: MarginName, margin: float) -> tuple[Tensor, Tensor]:
    """Put the margin on positives' cosines; return them and their derivatives, both of the input's shape.

    CosFace subtracts m from the cosine; ArcFace (Deng et al. 2019) is cos(theta + m). Past theta = pi - m
    that would rise again, so there, as in the reference code, it is cos(theta) - m * sin(m): still falling
    with theta, one small jump. PartialFC computes the margin without gradient, which silently replaces
    ArcFace's slope by 1; here it is exact.

    Args:
        cosine: Cosines between features and their positive centers.
        kind: cosface, arcface or none.
        margin: m; a cosine for cosface, radians for arcface.
    """
    if kind == "none":
        return cosine, torch.ones_like(cosine)
    if kind == "cosface":
        return cosine - margin, torch.ones_like(cosine)
    cos_m, sin_m = math.cos(margin), math.sin(margin)
    cosine = cosine.clamp(-1.0, 1.0)
    # At theta = 0 the slope of cos(theta + m) by cos(theta) is infinite: hold sin(theta) above rounding.
    sine = (1.0 - cosine * cosine).clamp_min(4 * torch.finfo(cosine.dtype).eps).sqrt()
    falling = cosine > -cos_m
    value = torch.where(falling, cosine * cos_m - sine * sin_m, cosine - margin * sin_m)
    slope = torch.where(falling, cos_m + sin_m * cosine / sine, torch.ones_like(cosine))
    return value, slope


class HeadWork(NamedTuple):
    """What a head's rows are scored with, and against what."""

    config: HeadConfig
    group: dist.ProcessGroup | None
    """All ranks; together they hold all classes. None where this rank is alone."""
    chunk_bytes: int
    """Memory for scores."""
    operand: torch.dtype
    """Type of the operands of matrix products."""
    scratch: Scratch
    targets: Targets
    weight: Tensor
    """Centers of this rank, of any length, [local classes, E]."""

    @property
    def in_flight(self) -> int:
        """Blocks that share the memory: while one's sums travel over the ranks the next is swept."""
        return 1 if self.group is None else 2

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> dist.Work | None:
        """Join a tensor over all ranks, in place; without ``wait`` it is under way on return."""
        if self.group is None:
            return None
        return dist.all_reduce(tensor, op=op, group=self.group, async_op=not wait)


@dataclass
class RowResults:
    """What is found out about the head's rows, each draw filling its part."""

    loss: Tensor
    """Sum of the row losses, 0-d float64."""
    cosines: Tensor
    """Positives' cosines, 0 where there is none, [head's rows, T]."""
    best: Tensor
    """Greatest cosine with a negative among this rank's classes, [head's rows]."""
    grad_features: Tensor | None
    """This rank's part of the gradient of all unit rows of the micro-step; None when it is not wanted."""


class _Swept(NamedTuple):
    """A block whose row sums are on their way over the ranks."""

    rows: slice
    features: Tensor
    """The block's rows as an operand, [r, E]."""
    buffer: TileBuffer
    parts: Tensor
    """Positives' scores and the sum over negatives, [r, T + 1]."""
    work: dist.Work | None


class DrawStream:
    """The scores of one draw, seen one tile at a time."""

    def __init__(
        self, work: HeadWork, draw: Draw, features: Tensor, centers: Tensor, results: RowResults
    ) -> None:
        """Take a draw, unit rows of the micro-step [all rows, E], and this rank's centers of the draw [C, E].

        Centers are of length 1 where the draw has chosen classes, of any length where it has all.
        """
        self._work, self._config, self._scratch = work, work.config, work.scratch
        self._draw, self._features, self._results = draw, features, results
        targets = work.targets
        self._index, self._columns = targets.index[draw.rows], targets.columns[draw.rows]
        self._valid, self._spared = targets.labels[draw.rows] >= 0, targets.spared[draw.rows]
        self._inverse = inverse_norms(centers) if targets.classes is None else None
        self._like = centers
        self._products = Products(work.operand)
        self._centers = self._products.narrow(centers)
        self._unit = work.config.scale * LOG2E
        self._plan = plan_tiles(
            rows=len(self._index),
            classes=len(centers),
            typical_classes=draw.typical_size,
            itemsize=centers.element_size(),
            budget=work.chunk_bytes // work.in_flight,
            device=kind_of_device(centers),
        )
        self._shift = self._row_maxima() if self._config.scale > BOUNDED_SCALE else None

    def run(self, grad_centers: Tensor | None) -> None:
        """Find the rows' losses and, where room for them is given, add the gradients to it.

        They are those of the unit centers, [C, E], over the centers' lengths if these were given as they are.
        """
        buffers = [TileBuffer(self._plan, self._scratch, f"tiles {n}") for n in range(self._work.in_flight)]
        waiting: list[_Swept] = []
        for number, rows in enumerate(self._plan.blocks()):
            waiting.append(self._sweep(rows, buffers[number % len(buffers)]))
            if len(waiting) == len(buffers):
                self._finish(waiting.pop(0), grad_centers)
        for swept in waiting:
            self._finish(swept, grad_centers)

    def _sweep(self, rows: slice, buffer: TileBuffer) -> _Swept:
        """Row sums of a block over this rank's classes; their sum over ranks is under way on return."""
        features = self._block(rows)
        parts = self._like.new_zeros((len(features), self._columns.shape[1] + 1))
        best = self._like.new_full((len(features),), float("-inf"))
        for number, tile in enumerate(self._plan.tiles()):
            scores = buffer.tile(number, len(features), tile)
            self._multiply(features, rows, tile, scores, parts[:, :-1])
            sum_exp, top = self._exponentiate(scores, rows, tile)
            parts[:, -1] += sum_exp
            torch.maximum(best, top, out=best)
        self._results.best[self._draw.rows][rows] = best / self._unit
        return _Swept(rows, features, buffer, parts, self._work.reduce(parts, wait=False))

    def _finish(self, swept: _Swept, grad_centers: Tensor | None) -> None:
        """Losses of a swept block, and the gradients from its tiles."""
        if swept.work is not None:
            swept.work.wait()
        config, results = self._config, self._results
        cosines = swept.parts[:, :-1] / self._unit
        results.cosines[self._draw.rows][swept.rows] = cosines
        with_margin, slope = apply_margin(cosines, config.margin_kind, config.margin)
        terms = row_terms(
            config.loss,
            scores=with_margin * config.scale,
            valid=self._valid[swept.rows],
            sum_exp=swept.parts[:, -1],
            shift=cosines.new_zeros(()) if self._shift is None else self._shift[swept.rows],
        )
        results.loss += terms.loss.sum(dtype=torch.float64)
        if results.grad_features is not None and grad_centers is not None:
            pulled = self._pull(
                swept, terms._replace(grad_positive=terms.grad_positive * slope), grad_centers
            )
            results.grad_features.index_copy_(0, self._index[swept.rows], pulled)

    def _pull(self, swept: _Swept, terms: RowTerms, grad_centers: Tensor) -> Tensor:
        """Turn a block's exponentials into gradients; return that of its unit rows, [r, E]."""
        features = swept.features
        grad_rows = self._like.new_zeros(features.shape)
        for number, tile in enumerate(self._plan.tiles()):
            scores = swept.buffer.tile(number, len(features), tile)
            if number >= self._plan.kept:
                self._multiply(features, swept.rows, tile, scores)
                self._exponentiate(scores, swept.rows, tile)
            line, inside = own_places(self._columns[swept.rows], tile)
            scores.mul_(terms.grad_negative)
            own = self._scaled(terms.grad_positive.T, tile, line)
            scores.scatter_add_(0, line, torch.where(inside, own, 0.0))
            operand = self._products.narrow(scores)
            self._products.add(grad_rows, operand.T, self._centers[tile])
            self._products.add(grad_centers[tile], operand, features, 1 / LOG2E)
        return grad_rows.mul_(self._config.scale)

    def _block(self, rows: slice) -> Tensor:
        """Unit rows of a block, times what makes their products scores in units of log 2, [r, E]."""
        chosen = self._features.index_select(0, self._index[rows])
        return self._products.narrow(chosen.to(self._like.dtype).mul_(self._unit))

    def _scaled(self, values: Tensor, tile: slice, line: Tensor) -> Tensor:
        """Values [T, r] over the lengths of the centers on these lines of a tile."""
        return values if self._inverse is None else values * self._inverse[tile][line]

    def _multiply(
        self, features: Tensor, rows: slice, tile: slice, out: Tensor, positives: Tensor | None = None
    ) -> None:
        """Write a tile's products [c, r], -inf at the rows' positives and what is near them: no negatives.

        The positives' scores are added to ``positives`` [r, T].
        """
        self._products.multiply(self._centers[tile], features.T, out)
        line, inside = own_places(self._columns[rows], tile)
        if positives is not None:
            positives += torch.where(inside, self._scaled(out.gather(0, line), tile, line), 0.0).T
        # Adding, where padding adds 0 to line 0, needs no list of pairs and so no size known to the host.
        out.scatter_add_(0, line, torch.where(inside, float("-inf"), 0.0).to(out.dtype))
        if self._spared.shape[1]:
            line, inside = own_places(self._spared[rows], tile)
            out.scatter_add_(0, line, torch.where(inside, float("-inf"), 0.0).to(out.dtype))

    def _exponentiate(self, products: Tensor, rows: slice, tile: slice) -> tuple[Tensor, Tensor]:
        shift = None if self._shift is None else self._shift[rows] * LOG2E
        return exponentiate(products, None if self._inverse is None else self._inverse[tile], shift)

    def _row_maxima(self) -> Tensor:
        """What to subtract from each row's scores when exp alone could overflow, [R].

        The greatest negative; not below 0 for the separated loss, whose log(1 + ...) brings the 0 itself.
        """
        buffer = TileBuffer(self._plan, self._scratch, "tiles 0")
        top = self._like.new_full((len(self._index),), float("-inf"))
        for rows in self._plan.blocks():
            features = self._block(rows)
            for number, tile in enumerate(self._plan.tiles()):
                scores = buffer.tile(number, len(features), tile)
                self._multiply(features, rows, tile, scores)
                if self._inverse is not None:
                    scores.mul_(self._inverse[tile][:, None])
                top[rows] = torch.maximum(top[rows], scores.amax(0))
        self._work.reduce(top, dist.ReduceOp.MAX)
        floor = 0.0 if self._config.loss == "separated" else -self._config.scale
        return (top / LOG2E).clamp_min(floor)


class RowSums(NamedTuple):
    """Sums over the head's rows."""

    loss: Tensor
    """0-d."""
    found: Tensor
    """Sum of the positives' cosines, and rows in which a positive beats all drawn negatives, [2]."""
    grad_features: Tensor | None
    """Gradient of the unit rows of the micro-step, [all rows, E], but for the loss's factor."""


class StreamedDraws:
    """A head's draws, one after the other."""

    def __init__(self, work: HeadWork) -> None:
        """Fetch the first draw's centers: the rows may still be under way."""
        self._work = work
        draws = work.targets.draws
        self._ahead = self._fetch(draws[0]) if draws else None

    def score(self, features: Tensor, gradient: ClassGradient | None) -> RowSums:
        """Score unit rows of the micro-step, [all rows, E]; gradients are made where one is given."""
        work, targets = self._work, self._work.targets
        features = features.to(work.weight.dtype)
        results = RowResults(
            loss=torch.zeros((), dtype=torch.float64, device=features.device),
            cosines=torch.zeros_like(targets.labels, dtype=features.dtype),
            best=features.new_full((len(targets.index),), float("-inf")),
            grad_features=None if gradient is None else torch.zeros_like(features),
        )
        for draw in targets.draws:
            chosen = targets.classes_of(draw)
            centers = self._fetch(draw) if self._ahead is None else self._ahead
            self._ahead = None
            room = None if gradient is None else gradient.buffer(chosen)
            DrawStream(work, draw, features, centers, results).run(room)
            if gradient is not None and room is not None:
                gradient.accumulate(chosen, room)
        found = torch.stack((results.cosines.sum(), self._won(results)))
        return RowSums(results.loss.to(features.dtype), found, results.grad_features)

    def _fetch(self, draw: Draw) -> Tensor:
        """Centers of a draw's classes, [C, E]; the same memory holds the next draw's.

        Chosen centers are copied, and as copies made unit ones: one pass over them instead of two over the
        scores. Where all classes are drawn there is no copy, and they keep their lengths.
        """
        weight, chosen = self._work.weight, self._work.targets.classes_of(draw)
        return weight if chosen is None else normalise(self._work.scratch.rows("centers", weight, chosen))

    def _won(self, results: RowResults) -> Tensor:
        """Rows in which a positive beats all drawn negatives, 0-d."""
        self._work.reduce(results.best, dist.ReduceOp.MAX)
        own = torch.where(self._work.targets.labels >= 0, results.cosines, -2.0)
        won = (own.amax(1) > results.best).sum() if own.numel() else results.best.sum()
        return won.to(results.best.dtype)


def score_rows(
    features: Tensor, gradient: ClassGradient, score: Callable[[Tensor, ClassGradient | None], RowSums]
) -> tuple[Tensor, Tensor]:
    """Score unit rows against a head's draws.

    Args:
        features: Unit rows of the micro-step, [all rows, E].
        gradient: Receives the centers' gradients if ``features`` wants one.
        score: ``score`` of a head's draws.

    Returns:
        The loss, which carries gradient, and what else was found, as in :class:`RowSums`.
    """
    learns = torch.is_grad_enabled() and features.requires_grad
    loss, found = _ScoreRows.apply(features, gradient if learns else None, score)
    return loss, found


class _ScoreRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        gradient: ClassGradient | None,
        score: Callable[[Tensor, ClassGradient | None], RowSums],
    ) -> tuple[Tensor, Tensor]:
        # Nobody asks for a gradient of what was found: no zeros are made for it.
        ctx.set_materialize_grads(False)
        sums = score(features, gradient)
        if gradient is not None:
            gradient.expect_factor()
            ctx.gradient, ctx.grad_features, ctx.narrow = gradient, sums.grad_features, features.dtype
        ctx.mark_non_differentiable(sums.found)
        return sums.loss, sums.found

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.gradient.take_factor(grad_total)
        # In place where the type allows it, since this is its only use: finish refuses a second backward.
        wide = ctx.grad_features
        out = wide if wide.dtype == ctx.narrow else torch.empty_like(wide, dtype=ctx.narrow)
        return torch.mul(wide, grad_total, out=out), None, None
