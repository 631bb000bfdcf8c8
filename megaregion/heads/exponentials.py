"""What stands between two matrix products: products become exponentials, their row sums and maxima.

Two kernels give the same: plain torch, which passes over the tile five times (in the cache of a
processor that is nearly free), and a Triton one for GPUs, which passes once.

Shapes: r rows of a block, c classes of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from megaregion.config import HeadBackend
from megaregion.errors import UserError

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
    mass = products.exp2_().sum(0)
    if inverse is not None:
        products.mul_(inverse[:, None])
    return mass, best


def choose_kernel(backend: HeadBackend) -> Kernel:
    """The kernel of a backend.

    ``auto`` is torch: the Triton kernel has been checked against it, but not yet timed on a GPU.

    Raises:
        UserError: Triton was asked for and is not installed.
    """
    if backend != "triton":
        return exponentiate
    if find_spec("triton") is None:
        raise UserError("head.backend triton needs the triton package, which is not installed; use torch")
    from megaregion.heads.triton_kernel import exponentiate_fused

    return exponentiate_fused


def greatest_scores(products: Tensor, inverse: Tensor | None) -> Tensor:
    """Greatest score of each row, [r]; the products are overwritten."""
    return torch.amax(products if inverse is None else products.mul_(inverse[:, None]), 0)
