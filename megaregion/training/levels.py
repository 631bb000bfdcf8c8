"""Which blocks of a run recompute what in the backward pass."""

from __future__ import annotations

from megaregion.config import RunConfig
from megaregion.models.recompute import Level, choose_levels, everywhere

GIB = 2**30


def recompute_levels(config: RunConfig, micro_batch: int, image_size: int) -> tuple[Level, ...]:
    """The level of each block by train.recompute and train.activation_gib.

    Args:
        config: The run.
        micro_batch: Images that a rank passes through the model at once.
        image_size: Their side, in pixels.
    """
    if config.train.recompute:
        return everywhere("full", config.model.depth)
    return choose_levels(
        config.model,
        micro_batch * (1 + (image_size // config.model.patch_size) ** 2),
        2 if config.train.precision == "bf16" else 4,
        config.train.activation_gib * GIB,
        config.parallel.tensor,
        config.parallel.tensor if config.parallel.tokens_cut else 1,
    )
