"""A run's resolutions, planned one by one: each has its own memory, step time and share of the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megaregion.config import RunConfig
from megaregion.planning.hardware import Hardware
from megaregion.planning.layout import Labels
from megaregion.planning.plan import Plan, make_plan


def stage_plans(
    config: RunConfig, hardware: Hardware, labels: Labels, samples: int | None = None
) -> list[Plan]:
    """A plan for each resolution that the run reaches, in their order.

    Args:
        config: The run; without stages it has one resolution.
        hardware: The cluster.
        labels: The label spaces.
        samples: Images of the whole run; those of train.steps if None.

    Raises:
        UserError: The ranks do not suit parallel.tensor or the global batch.
    """
    end = samples or config.train.steps * config.train.global_batch
    starts = [0, *(stage.from_image for stage in config.stages), end]
    plans = []
    for number, start in enumerate(starts[:-1]):
        if (span := min(end, starts[number + 1]) - start) > 0:
            plans.append(make_plan(at_stage(config, number), hardware, labels, span))
    return plans


def at_stage(config: RunConfig, number: int) -> RunConfig:
    """The run as if it had only one resolution: the first for 0, then those of its stages."""
    if number == 0:
        return dataclasses.replace(config, stages=())
    stage = config.stages[number - 1]
    model = dataclasses.replace(config.model, image_size=stage.image_size)
    micro_batch = stage.micro_batch or config.train.micro_batch
    train = dataclasses.replace(config.train, micro_batch=micro_batch)
    return dataclasses.replace(config, model=model, train=train, stages=())


def fullest(plans: Sequence[Plan]) -> Plan:
    """The resolution that needs the most memory."""
    return max(plans, key=lambda plan: plan.memory.peak)
