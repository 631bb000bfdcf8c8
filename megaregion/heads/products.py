"""Matrix products of the streaming loss: operands of one type, results and sums wide.

On a GPU with a bf16 body the operands are bf16, the results fp32: features came as bf16 anyway, and a
center rounded to bf16 moves a score by less than the noise of sampling. Everywhere else operands keep
the type of the centers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaregion.products import product, takes_onednn


class Products:
    """Products of matrices whose elements are first rounded to one type."""

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
