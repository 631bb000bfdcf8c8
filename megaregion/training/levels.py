"""Which blocks of a run recompute what in the backward pass."""

from __future__ import annotations

from megaregion.config import RunConfig, accumulation
from megaregion.models.recompute import Level, choose_levels, everywhere
from megaregion.parallel.topology import Topology

GIB = 2**30


def recompute_levels(config: RunConfig, topology: Topology) -> tuple[Level, ...]:
    """The level of each block by train.recompute and train.activation_gib."""
    if config.train.recompute:
        return everywhere("full", config.model.depth)
    images = config.train.global_batch // topology.data_size // accumulation(config, topology.data_size)
    return choose_levels(
        config.model,
        images * (1 + config.largest().grid ** 2),
        2 if config.train.precision == "bf16" else 4,
        config.train.activation_gib * GIB,
        topology.tensor_size,
    )
