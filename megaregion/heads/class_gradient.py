"""Gradients of centers, summed over the micro-steps of a step; only classes that took part have one.

Shapes: K local classes, E embedding width, n classes that took part so far.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ClassGradient:
    """A row-sparse matrix [K, E] that grows with the classes that take part."""

    def __init__(self, classes: int, dim: int, like: Tensor) -> None:
        self.classes = classes
        self.dim = dim
        self.like = like
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.rows: Tensor | None = self.like.new_empty(0, dtype=torch.int64)
        """Classes that took part, in the order of ``values``; None for all of them."""
        self.values = self.like.new_empty((0, self.dim))
        """Their gradients, [n, E]."""
        self._slots: Tensor | None = None

    def open(self, classes: Tensor | None) -> Tensor | None:
        """Make room for a draw's classes and return their places in ``values`` (None: all, in order)."""
        if self.rows is None:
            return classes
        if classes is None:
            self._widen()
            return None
        if self._slots is None:
            self._slots = torch.full((self.classes,), -1, dtype=torch.int64, device=self.like.device)
        fresh = classes[self._slots[classes] < 0]
        first = len(self.values)
        self._slots[fresh] = torch.arange(first, first + len(fresh), device=self.like.device)
        self.rows = torch.cat([self.rows, fresh])
        self.values = torch.cat([self.values, self.values.new_zeros((len(fresh), self.dim))])
        return self._slots[classes]

    def add(self, places: Tensor | None, chunk: slice, gradient: Tensor) -> None:
        """Add the gradients [chunk, E] of a chunk of an opened draw."""
        if places is None:
            self.values[chunk] += gradient
        else:
            self.values.index_add_(0, places[chunk], gradient)

    def _widen(self) -> None:
        dense = self.values.new_zeros((self.classes, self.dim))
        if self.rows is not None:
            dense[self.rows] = self.values
        self.rows, self.values, self._slots = None, dense, None
