"""What the streaming loss asks of the device: matrix products, and the exponentials that stand between them.

On a GPU with a bf16 body the operands are bf16, the results fp32: features came as bf16 anyway, and a
center rounded to bf16 moves a score by less than the noise of sampling. Everywhere else operands keep
the type of the centers.

Two kernels make exponentials, their row sums and maxima of products, and give the same: plain torch, which
passes over the tile five times (in the cache of a processor that is nearly free), and a Triton one for
GPUs, which passes once.

Shapes: r rows of a block, c classes of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from megaregion.config import HeadBackend
from megaregion.errors import UserError
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


Kernel = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""(products [c, r], inverse [c] or None, shift [r] or None) -> (row sums [r], row maxima [r]); see
exponentiate."""


def exponentiate(products: Tensor, inverse: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace products by the exponentials of their scores, over the centers' lengths.

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


def choose_kernel(backend: HeadBackend) -> Kernel:
    """The kernel of a backend; auto is torch, since the Triton one has not been timed on a GPU yet.

    Raises:
        UserError: Triton was asked for and is not installed.
    """
    if backend != "triton":
        return exponentiate
    if find_spec("triton") is None:
        raise UserError("head.backend triton needs the triton package, which is not installed; use torch")
    from megaregion.heads.triton_kernel import exponentiate_fused

    return exponentiate_fused
