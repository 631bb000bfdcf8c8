"""Sequence parallelism: between the cut linears each tensor rank holds its share of the tokens.

Without it every tensor rank repeats norms and residual sums on all tokens and keeps them all for the backward
pass. With it a column-cut linear first gathers the tokens, a row-cut one sums and scatters them in one
collective instead of an all-reduce, and everything between is one part in T. (Korthikanti et al., Reducing
Activation Recomputation in Large Transformer Models, 2022; megatron-core's own needs a GPU and as many
tokens as the ranks divide.)

Parts are rows of the flattened tokens; zeros fill the last rank's, where the ranks do not divide them.

Shapes: R tokens of all images, S rows of a part (R / T rounded up), T tensor ranks, I input width, O output
width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaregion.products import outer_sum, product


class CutStream:
    """Tokens cut over the tensor ranks; it takes the place of a model's own stream (models/vit.py)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def scatter(self, tokens: Tensor) -> Tensor:
        """This rank's part of whole tokens, [B, T, D] to [S, D]; gradients come back whole on every rank."""
        part: Tensor = _Scatter.apply(tokens.flatten(0, -2), self._group)
        return part

    def gather(self, part: Tensor, images: int, tokens: int) -> Tensor:
        """All parts, [S, D] to [B, T, D]; what follows must be the same on every rank."""
        rows: Tensor = _Gather.apply(part, images * tokens, self._group)
        return rows.view(images, tokens, -1)


def gathered_linear(part: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """A column-cut linear of all tokens: parts [S, I] to this rank's outputs of all rows, [T S, O / T].

    ``weight`` [O / T, I] and ``bias`` [O / T] are this rank's. Only the part is kept for the backward pass,
    which gathers the tokens again beside a product.
    """
    outputs: Tensor = _GatheredLinear.apply(part, weight, bias, group)
    return outputs


def scattered_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """A row-cut linear of all tokens [..., I / T], summed over the ranks; each gets its part, [S, O].

    ``weight`` [O, I / T] is this rank's; ``bias`` [O] is whole, and so is its gradient.
    """
    part: Tensor = _ScatteredLinear.apply(inputs.flatten(0, -2), weight, bias, group)
    return part


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.count = group, len(rows)
        return _own(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group)[: ctx.count], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(part, group)[:count]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own(grad, ctx.group), None, None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(part, weight)
        ctx.group, ctx.biased = group, bias is not None
        return product(_gather(part, group), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        part, weight = ctx.saved_tensors
        # Both collectives run beside a product (on a GPU, where CUDA_DEVICE_MAX_CONNECTIONS is 1).
        tokens, gathering = _start_gather(part, ctx.group)
        grad_tokens = product(grad, weight.T)
        gathering.wait()
        grad_part, scattering = _start_scatter(grad_tokens, ctx.group)
        grad_weight = outer_sum(grad, tokens)
        grad_bias = grad.sum(0) if ctx.biased else None
        scattering.wait()
        return grad_part, grad_weight, grad_bias, None


class _ScatteredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.group, ctx.biased = group, bias is not None
        part, scattering = _start_scatter(_padded(product(inputs, weight), group), group)
        scattering.wait()
        return part if bias is None else part.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad_part: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad = _gather(grad_part, ctx.group)[: len(inputs)]
        # Every rank has the gradients of all tokens here: the bias needs no sum of its own.
        grad_bias = grad.sum(0) if ctx.biased else None
        return product(grad, weight.T), outer_sum(grad, inputs), grad_bias, None


def _padded(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    missing = -len(rows) % group.size()
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _own(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy: a view would keep all rows in memory.
    return _padded(rows, group).chunk(group.size())[group.rank()].clone()


def _gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows, gathering = _start_gather(part, group)
    gathering.wait()
    return rows


def _start_gather(part: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    rows = part.new_empty(group.size() * len(part), part.shape[-1])
    return rows, dist.all_gather_into_tensor(rows, part.contiguous(), group=group, async_op=True)


def _start_scatter(rows: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    part = rows.new_empty(len(rows) // group.size(), rows.shape[-1])
    return part, dist.reduce_scatter_tensor(part, rows.contiguous(), group=group, async_op=True)
