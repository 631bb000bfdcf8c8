"""Gradients of whole parameters of which each tensor rank computes only its part.

Such a parameter meets only this rank's heads, or only this rank's tokens. Nothing fails where their gradients
are not summed, the run is just wrong; and a sum for each parameter by itself would be hundreds of tiny
collectives in every backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def sum_over_ranks(model: nn.Module, names: Sequence[str], group: dist.ProcessGroup) -> None:
    """Let one all-reduce sum the gradients of all these parameters when a backward pass has seen them all.

    While the model's forward pass runs, its modules find in a parameter's place what one function of all of
    them returned: the same values. Autograd calls that function's backward once, last.

    Args:
        model: The model; its parameters stay where they are for all others (optimizer, ZeRO, checkpoints).
        names: The parameters, by name.
        group: The ranks.
    """
    if not names:
        return
    parameters = [model.get_parameter(name) for name in names]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]

    def lend(*_: Any) -> None:
        for (module, name), lent in zip(places, _SumOverRanks.apply(group, *parameters), strict=True):
            # Beside the parameter, not instead of it: an attribute of the object is found first.
            vars(module)[name] = lent

    def take_back(*_: Any) -> None:
        for module, name in places:
            vars(module).pop(name, None)

    model.register_forward_pre_hook(lend)
    model.register_forward_hook(take_back, always_call=True)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *parts: Tensor) -> tuple[Tensor | None, ...]:
        # In at least fp32, so that many ranks' parts lose nothing before they meet.
        wide = torch.promote_types(parts[0].dtype, torch.float32)
        total = torch.cat([part.to(wide).flatten() for part in parts])
        dist.all_reduce(total, group=ctx.group)
        sums = total.split([part.numel() for part in parts])
        return None, *(own.view_as(part).to(part.dtype) for own, part in zip(sums, parts, strict=True))
