"""Gradients of centers, summed over the micro-steps of a step; only classes that took part have one.

What the streaming loss adds up is the gradient of the *unit* centers, before the factor that the rest of
the graph puts on the loss; a draw of all classes, which reads the centers where they lie, has divided by
their lengths already. All corrections are linear and the centers stand still during a step, so they are
made once, when the step ends: the part along the center goes, length and factor come.

One draw's gradients are kept as they are, by class. When a second draw comes, both go into a matrix of all
local classes with a mark for each that took part: sizes stay unknown to the host until the step ends, which
asks the device once.

Shapes: K local classes, E embedding width, C classes of a draw, n classes that took part so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaregion.heads.lengths import inverse_lengths
from megaregion.heads.portions import lines_at_a_time
from megaregion.heads.scratch import Scratch


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
        self._over_lengths = True
        self._factor: Tensor | None = None
        self._uneven = torch.zeros((), dtype=torch.bool, device=self._weight.device)
        self._awaited = self._factors = 0
        self._squares: Tensor | None = None

    def room(self, classes: Tensor | None) -> Tensor:
        """Room for a draw's gradients, [C, E], to be added to and then given to ``settle``."""
        if self._squares is not None:
            raise RuntimeError("the step's gradients are finished; call zero_grad() before the next loss")
        if classes is None:
            self._widen().fill_(True)
            return self.values
        name = "values" if self._is_empty() else "room"
        return self._scratch.take(name, (len(classes), self._weight.shape[1])).zero_()

    def settle(self, classes: Tensor | None, room: Tensor) -> None:
        """Take over the gradients of a draw."""
        if classes is None:
            return
        # A head draws all classes in every draw or in none, so one mark does for the sum.
        self._over_lengths = False
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
            inverse = inverse_lengths(centers)
            along = (values * centers).sum(1) * inverse.square()
            scale = factor if self._over_lengths else factor * inverse[:, None]
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
