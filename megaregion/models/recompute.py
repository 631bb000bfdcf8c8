"""Activation checkpointing: what the backward pass computes again instead of keeping, block by block.

    keep    everything that autograd wants: 8 D + 2 M numbers a token and block
    cheap   outputs of norms and of the MLP's non-linearity are made again from their inputs, at about 1% of
            the time: 6 D + M numbers
    full    only the block's input is kept and its forward pass runs again: D numbers, a third more time

Shapes: T image tokens, N regions of an image, D width, M MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from megaregion.config import ModelConfig, RunConfig

Recompute = Literal["keep", "cheap", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("keep", "cheap", "full")
GIB = 2**30
Result = TypeVar("Result")


def recomputed(
    made: Tensor, source: Tensor, make: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    """While it is open, autograd keeps ``source`` in the place of ``made``.

    Args:
        made: A tensor that operations inside are about to save for the backward pass.
        source: What it was made from; kept anyway, or smaller.
        make: Makes it again, to the bit.
    """
    # The hooks live as long as the graph: they must not hold what they are to save.
    place, numbers, kept = made.data_ptr(), made.numel(), source.detach()

    def pack(saved: Tensor) -> Any:
        if saved.data_ptr() == place and saved.numel() == numbers:
            return saved.shape
        for see in _WATCHERS:
            see(saved)
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return make(kept).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


_WATCHERS: list[Callable[[Tensor], None]] = []


def run_and_count(parameters: Iterable[Tensor], forward: Callable[[], Result]) -> tuple[Result, int]:
    """What a forward pass gives, and the bytes that autograd keeps of it, parameters left out.

    Hooks alone would see nothing inside of :func:`recomputed`.
    """
    own, kept = list(parameters), dict[int, torch.UntypedStorage]()

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Asked each time: ZeRO 3 gathers a parameter to another place for every use.
        if all(storage._cdata != parameter.untyped_storage()._cdata for parameter in own):
            kept[storage._cdata] = storage

    def pack(saved: Tensor) -> Tensor:
        note(saved)
        return saved

    _WATCHERS.append(note)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            result = forward()
    finally:
        _WATCHERS.remove(note)
    return result, sum(storage.nbytes() for storage in kept.values())


def kept_bytes(
    model: ModelConfig, tokens: int, recompute: Recompute, item: int, tensor: int = 1, spread: int = 1
) -> int:
    """Activations that one block keeps for its backward pass, in bytes.

    Args:
        model: Sizes of the transformer.
        tokens: Tokens of the micro-batch that pass through the block.
        recompute: What is kept and what not.
        item: Bytes of a number.
        tensor: Ranks that share the heads and the MLP.
        spread: Ranks that share the tokens between the linears.
    """
    width, mlp = model.width, model.mlp_width
    numbers = {
        "keep": 4 * width / spread + (4 * width + 2 * mlp) / tensor,
        "cheap": 2 * width / spread + (4 * width + mlp) / tensor,
        "full": width / spread,
    }[recompute]
    return round(tokens * numbers * item)


def choose_recompute(
    model: ModelConfig, tokens: int, item: int, budget: float, tensor: int = 1, spread: int = 1
) -> tuple[Recompute, ...]:
    """What each block computes again to fit a budget at the least time; all full where nothing fits.

    The budget is in bytes for what all blocks keep, 0 for no bound; the rest as in :func:`kept_bytes`.
    """
    if budget <= 0:
        return everywhere("keep", model.depth)
    keep, cheap, full = (
        kept_bytes(model, tokens, recompute, item, tensor, spread) for recompute in RECOMPUTE
    )
    # The last blocks' activations live the shortest: they are the ones that keep the most.
    if (spare := budget - model.depth * cheap) >= 0:
        kept = min(model.depth, int(spare // max(1, keep - cheap)))
        return everywhere("cheap", model.depth - kept) + everywhere("keep", kept)
    # A block that runs again has all it keeps in memory for a while, beside the others' inputs.
    spare = budget - cheap - model.depth * full
    kept = max(0, int(spare // max(1, cheap - full)))
    return everywhere("full", model.depth - kept) + everywhere("cheap", kept)


def everywhere(recompute: Recompute, blocks: int) -> tuple[Recompute, ...]:
    """The same for so many blocks."""
    return (recompute,) * blocks


def recompute_of_run(config: RunConfig, micro_batch: int, image_size: int) -> tuple[Recompute, ...]:
    """What each block computes again, by train.recompute and train.activation_gib; the size in pixels."""
    if config.train.recompute:
        return everywhere("full", config.model.depth)
    return choose_recompute(
        config.model,
        micro_batch * (1 + (image_size // config.model.patch_size) ** 2),
        config.train.value_bytes,
        config.train.activation_gib * GIB,
        config.parallel.tensor,
        config.parallel.tensor if config.parallel.tokens_cut else 1,
    )
