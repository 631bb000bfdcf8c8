"""The centers' gradients and their AdamW: only classes that took part in a step are decayed and moved.

The streaming loss adds up the gradient of the *unit* centers, before the factor that the rest of the graph
puts on the loss; a draw of all classes, which reads the centers where they lie, has divided by their lengths
already. All corrections are linear and the centers stand still during a step, so they are made once, when the
step ends: the part along the center goes, length and factor come.

One draw's gradients are kept as they are, by class. When a second draw comes, both go into a matrix of all
local classes with a mark for each that took part: sizes stay unknown to the host until the step ends.

A dense AdamW would move every center in every step, on the moments of steps long past. Here a row that was
not drawn keeps weight and moments bit for bit, and the bias correction counts the steps that the row itself
has seen. When every row takes part each time this is torch.optim.AdamW.

Shapes: K local classes, E embedding width, C classes of a draw, n classes that took part so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaregion.config import OptimizerConfig
from megaregion.heads.centers import inverse_norms
from megaregion.heads.tiles import Scratch, lines_at_a_time


class ClassGradient:
    """A row-sparse matrix [K, E] that grows with the classes that take part."""

    def __init__(self, weight: Tensor) -> None:
        """Start without any class of ``weight`` [K, E]."""
        self._weight = weight
        self._scratch = Scratch(weight)
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.rows: Tensor | None = torch.empty(0, dtype=torch.int64, device=self._weight.device)
        """Classes that took part, in the order of ``values``; None for all of them (or not yet known)."""
        self.values = self._weight.new_empty((0, self._weight.shape[1]))
        """Their gradients, [n, E]; final after ``finish``."""
        self._marks: Tensor | None = None
        self._over_norms = True
        self._factor: Tensor | None = None
        self._uneven = torch.zeros((), dtype=torch.bool, device=self._weight.device)
        self._awaited = self._factors = 0
        self._squares: Tensor | None = None

    def buffer(self, classes: Tensor | None) -> Tensor:
        """Room for a draw's gradients, [C, E], to be added to and then given to ``accumulate``."""
        if self._squares is not None:
            raise RuntimeError("the step's gradients are finished; call zero_grad() before the next loss")
        if classes is None:
            self._widen().fill_(True)
            return self.values
        name = "values" if self._is_empty() else "room"
        return self._scratch.take(name, (len(classes), self._weight.shape[1])).zero_()

    def accumulate(self, classes: Tensor | None, room: Tensor) -> None:
        """Take over the gradients of a draw."""
        if classes is None:
            return
        # A head draws all classes in every draw or in none, so one mark does for the sum.
        self._over_norms = False
        if self._is_empty():
            self.rows, self.values = classes, room
            return
        self._widen().index_fill_(0, classes, True)
        self.values.index_add_(0, classes, room)

    def expect_factor(self) -> None:
        """Count a loss whose backward is still to come."""
        self._awaited += 1

    def take_factor(self, factor: Tensor) -> None:
        """Take the derivative of the total by one micro-step's loss, 0-d; it must be the same for all."""
        self._awaited -= 1
        self._factors += 1
        if self._factor is None:
            self._factor = factor
        self._uneven |= factor != self._factor

    @torch.no_grad()
    def finish(self) -> Tensor:
        """Make the gradients those of the centers as they are; return their squared norm, 0-d float64.

        Raises:
            RuntimeError: The step's losses were weighted differently, or one was not sent backward.
        """
        if self._squares is not None:
            return self._squares
        if self._awaited:
            raise RuntimeError(
                f"backward was missed (or repeated) for {abs(self._awaited)} losses of this step; zero_grad()"
            )
        uneven, marked = self._ask()
        if uneven:
            raise RuntimeError("the losses of one step must enter the total with the same weight")
        self._squares = torch.zeros((), dtype=torch.float64, device=self._weight.device)
        factor = self._weight.new_ones(()) if self._factor is None else self._factor.to(self._weight.dtype)
        self._narrow(marked)
        block = lines_at_a_time(self._weight)
        for start in range(0, len(self.values), block):
            part = slice(start, min(start + block, len(self.values)))
            centers = (
                self._weight[part] if self.rows is None else self._weight.index_select(0, self.rows[part])
            )
            values = self.values[part]
            inverse = inverse_norms(centers)
            along = (values * centers).sum(1) * inverse.square()
            scale = factor if self._over_norms else factor * inverse[:, None]
            values.addcmul_(centers, along[:, None], value=-1).mul_(scale)
            # By rows, each in its own type: a wide norm of the block would first copy it.
            self._squares += torch.linalg.vector_norm(values, dim=1).double().square().sum()
        return self._squares

    def _is_empty(self) -> bool:
        return self._marks is None and self.rows is not None and len(self.rows) == 0

    def _widen(self) -> Tensor:
        """Turn ``values`` into a matrix of all classes, [K, E]; return the marks of those that took part."""
        if self._marks is None:
            dense = self._scratch.take("dense", tuple(self._weight.shape)).zero_()
            self._marks = torch.zeros(len(dense), dtype=torch.bool, device=dense.device)
            if self.rows is not None:
                dense.index_copy_(0, self.rows, self.values)
                self._marks.index_fill_(0, self.rows, True)
            self.rows, self.values = None, dense
        return self._marks

    def _ask(self) -> tuple[bool, int]:
        """Whether the losses' factors differ, and how many classes are marked; waits for the device once."""
        if self._marks is None and self._factors < 2:
            return False, 0
        marked = self._uneven.new_zeros((), dtype=torch.int64) if self._marks is None else self._marks.sum()
        uneven, count = torch.stack([self._uneven.long(), marked]).tolist()
        return uneven > 0, count

    def _narrow(self, marked: int) -> None:
        """Keep of a matrix of all classes only those that took part."""
        if self._marks is None or marked == len(self._marks):
            return
        self.rows = torch.nonzero_static(self._marks, size=marked).squeeze(1)
        self.values = self.values.index_select(0, self.rows)


class RowAdamW:
    """AdamW over the rows of one matrix."""

    def __init__(self, weight: Tensor, config: OptimizerConfig) -> None:
        """Start with moments of zero for ``weight`` [K, E]."""
        self.weight = weight
        self.config = config
        moments = torch.bfloat16 if config.head_moments == "bf16" else weight.dtype
        self.exp_avg = torch.zeros_like(weight, dtype=moments)
        self.exp_avg_sq = torch.zeros_like(weight, dtype=moments)
        self.count = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)

    def to(self, weight: Tensor) -> None:
        """Follow the matrix to where it was moved."""
        self.weight = weight
        for name in ("exp_avg", "exp_avg_sq", "count"):
            setattr(self, name, getattr(self, name).to(weight.device))

    @torch.no_grad()
    def step(self, rows: Tensor | None, gradient: Tensor, lr: float, scale: Tensor | float = 1.0) -> None:
        """Move rising ``rows`` [n] (None: all) by ``scale`` (which clips) times their gradient [n, E]."""
        block = lines_at_a_time(self.weight)
        for start in range(0, len(gradient), block):
            part = slice(start, min(start + block, len(gradient)))
            scaled = gradient[part] if isinstance(scale, float) and scale == 1.0 else gradient[part] * scale
            self._step_block(part if rows is None else rows[part], scaled, lr)

    def _step_block(self, rows: slice | Tensor, gradient: Tensor, lr: float) -> None:
        config = self.config
        states = self.weight, self.exp_avg, self.exp_avg_sq, self.count
        # A slice gives views that are updated in place; chosen or narrow rows are copied out and back.
        taken = [state.index_select(0, rows) if isinstance(rows, Tensor) else state[rows] for state in states]
        wide = [state.to(self.weight.dtype) for state in taken[:3]]
        weight, exp_avg, exp_avg_sq, count = *wide, taken[3]
        count += 1
        exp_avg.lerp_(gradient, 1 - config.beta1)
        exp_avg_sq.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        if config.head_weight_decay:
            weight.mul_(1 - lr * config.head_weight_decay)
        # m / c1 / (sqrt(v / c2) + eps) with both corrections of a row brought into the denominator.
        seen = count.to(torch.float64)
        stretch = 1 - config.beta1**seen
        slope = (stretch * (1 - config.beta2**seen).rsqrt()).to(gradient.dtype)
        floor = (stretch * config.eps).to(gradient.dtype)
        root = torch.addcmul(floor[:, None], exp_avg_sq.sqrt(), slope[:, None])
        weight.addcdiv_(exp_avg, root, value=-lr)
        for state, own, updated in zip(states, taken, (weight, exp_avg, exp_avg_sq, count), strict=True):
            if isinstance(rows, Tensor):
                state.index_copy_(0, rows, updated.to(state.dtype))
            elif updated is not own:
                own.copy_(updated)
