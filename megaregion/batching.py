"""How data-parallel ranks cut a step's global batch into micro-steps, and what shares a draw of negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaregion.config import RunConfig, StageConfig
from megaregion.errors import UserError


@dataclass(frozen=True)
class Batching:
    """One step on one data-parallel rank."""

    micro_batch: int
    """Images that the rank passes through the model at once."""
    micro_steps: int
    """How often it does so before the optimizer moves."""
    draw_images: int
    """Images, over all data ranks, that share one draw of negatives."""


def batching(config: RunConfig, data_ranks: int, stage: StageConfig | None = None) -> Batching:
    """Cut the global batch.

    It stays what it is on any number of ranks; where the wanted micro-batch does not divide a rank's share of
    it, the next smaller number of images that does is taken.

    Args:
        config: The run.
        data_ranks: Data-parallel ranks.
        stage: The resolution, which may have a micro-batch of its own; None for the first.

    Raises:
        UserError: The global batch cannot be spread over the ranks, or no micro-batch fits head.draw_images.
    """
    batch, heads = config.train.global_batch, (config.head.object, config.head.text)
    # A draw of all classes is the same for any images that share it.
    drawn = config.head.draw_images if min(head.sample_rate for head in heads) < 1 else 0
    most = (stage.micro_batch if stage else 0) or config.train.micro_batch
    if batch % data_ranks:
        raise UserError(
            f"train.global_batch must be a multiple of the {data_ranks} data-parallel ranks, got "
            f"{batch}; data-parallel sizes that work: {', '.join(map(str, divisors(batch)[:24]))}"
        )
    images = batch // data_ranks
    fitting = [d for d in divisors(images) if d <= most and (not drawn or d * data_ranks % drawn == 0)]
    if not fitting:
        micro_step = _largest_divisor(images, most) * data_ranks
        raise UserError(
            f"head.draw_images must divide the {micro_step} images of a micro-step over all "
            f"{data_ranks} data-parallel ranks, got {drawn}; use {_largest_divisor(micro_step, drawn)}"
        )
    return Batching(fitting[-1], images // fitting[-1], drawn or fitting[-1] * data_ranks)


def check_batching(config: RunConfig, data_ranks: int) -> None:
    """Check that the global batch can be cut at every resolution of the run.

    Raises:
        UserError: As :func:`batching`.
    """
    for stage in (None, *config.stages):
        batching(config, data_ranks, stage)


def fitting_nodes(config: RunConfig, nodes: int, ranks_per_node: int) -> int:
    """The most nodes, of those that are there, on which this run can go on with the same global batch.

    Args:
        config: The run.
        nodes: Nodes of the allocation.
        ranks_per_node: Ranks on each.

    Raises:
        UserError: Not even one node fits; the text is that of the whole allocation.
    """
    refusal = None
    for count in range(nodes, 0, -1):
        ranks = count * ranks_per_node
        try:
            if ranks % config.parallel.tensor:
                raise UserError(
                    f"parallel.tensor must divide the number of ranks {ranks}, got {config.parallel.tensor}"
                )
            check_batching(config, ranks // config.parallel.tensor)
        except UserError as error:
            refusal = refusal or error
        else:
            return count
    raise refusal or UserError(f"--fit-nodes must be at least 1, got {nodes}")


def divisors(number: int) -> list[int]:
    """All divisors, rising."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in divisors(number) if d <= max(1, limit))
