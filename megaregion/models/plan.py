"""Which linears of a model may be cut over ranks, and how; the model itself knows no rank."""

from __future__ import annotations

from typing import Literal

from torch import nn

Cut = Literal["column", "row"]

CUTS: dict[str, Cut] = {"qkv": "column", "out": "row", "fc1": "column", "fc2": "row"}
"""column: each rank holds some outputs (rows of the weight, and their biases); row: some inputs
(columns of the weight), and the sum over ranks plus one replicated bias is the output."""


def tensor_parallel_plan(model: nn.Module) -> dict[str, Cut]:
    """Name every linear that tensor parallelism cuts.

    Args:
        model: A model made of ``Block``s.

    Returns:
        Module name (as in ``named_modules``) to its cut; all other modules are whole on every rank.
    """
    return {
        name: CUTS[name.rpartition(".")[2]]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in CUTS
    }


def partial_gradients(model: nn.Module, tokens_cut: bool) -> list[str]:
    """Name every whole parameter to which each rank sends back only what its own heads or tokens do.

    The sum over ranks is its gradient.

    Args:
        model: A model made of ``Block``s.
        tokens_cut: Whether the tokens between the linears are cut over ranks too.
    """
    norms = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias") if tokens_cut else ()
    return [name for name, _ in model.named_parameters() if name.endswith(("class_pos_emb", *norms))]
