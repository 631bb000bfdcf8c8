"""Row-sparse AdamW: only the centers that took part in a step are decayed and moved.

A dense AdamW would decay and move every center in every step, on the moments of steps long past. Here a
row that was not drawn keeps weight and moments bit for bit, and the bias correction counts the steps
that the row itself has seen. When every row takes part each time this is torch.optim.AdamW.

Shapes: K local classes, E embedding width, n rows that took part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaregion.config import OptimizerConfig
from megaregion.heads.portions import lines_at_a_time


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
        """Decay and move some rows.

        Args:
            rows: Rising row numbers, int64 [n]; None for all rows.
            gradient: Their gradients, [n, E].
            lr: Learning rate.
            scale: Factor of the gradient (the clip coefficient).
        """
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
