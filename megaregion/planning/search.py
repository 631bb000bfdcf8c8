"""The best of the legal ways to spread a run.

Tensor ranks, tokens cut over them or not, ZeRO stage, micro-batch, recomputing or not.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from megaregion.checks import check_config
from megaregion.config import ParallelConfig, RunConfig
from megaregion.errors import UserError
from megaregion.planning.hardware import GIB, Hardware
from megaregion.planning.layout import Labels
from megaregion.planning.plan import Plan, make_plan


def all_plans(
    config: RunConfig, hardware: Hardware, labels: Labels, samples: int | None = None
) -> list[Plan]:
    """Plans of every legal choice, the fastest first; whether they fit is not asked.

    Args:
        config: The run; what is chosen here is replaced.
        hardware: The cluster.
        labels: The label spaces.
        samples: Images of the whole run.
    """
    plans = []
    for choice in _choices(config, hardware):
        try:
            check_config(choice)
            plans.append(make_plan(choice, hardware, labels, samples))
        except UserError:
            continue
    return sorted(plans, key=lambda plan: plan.time.total)


def best_plans(plans: list[Plan], count: int) -> list[Plan]:
    """The fastest plans that fit, one for each (tensor, sequence, ZeRO stage, recompute).

    Args:
        plans: Plans, the fastest first.
        count: Plans wanted.

    Raises:
        UserError: None fits; the text says by how much and what would.
    """
    fitting: dict[tuple[int, bool, int, bool], Plan] = {}
    for plan in plans:
        if plan.fits:
            fitting.setdefault(_way(plan), plan)
    if not fitting:
        raise UserError(_nothing_fits(plans))
    return list(fitting.values())[:count]


def _way(plan: Plan) -> tuple[int, bool, int, bool]:
    parallel = plan.layout.config.parallel
    return parallel.tensor, parallel.sequence, parallel.zero_stage, plan.layout.config.train.recompute


def _choices(config: RunConfig, hardware: Hardware) -> Iterator[RunConfig]:
    most = min(hardware.gpus_per_node, hardware.gpus)
    # More than a node's ranks would send every block's activations over the network.
    tensors = [size for size in range(1, most + 1) if hardware.gpus % size == 0 and most % size == 0]
    stages = (0, 1, 2, 3) if config.train.precision == "fp32" else (1, 2, 3)
    for tensor in tensors:
        data = hardware.gpus // tensor
        if config.train.global_batch % data:
            continue
        images = config.train.global_batch // data
        for micro_batch in (size for size in range(1, images + 1) if images % size == 0):
            for stage in stages:
                for recompute, sequence in itertools.product((False, True), {tensor > 1, False}):
                    yield dataclasses.replace(
                        config,
                        parallel=ParallelConfig(tensor=tensor, sequence=sequence, zero_stage=stage),
                        train=dataclasses.replace(config.train, micro_batch=micro_batch, recompute=recompute),
                    )


def _nothing_fits(plans: list[Plan]) -> str:
    if not plans:
        return (
            "no choice of parallel.tensor and train.micro_batch is legal on these ranks; train.global_batch "
            "must be a multiple of ranks / parallel.tensor, and parallel.tensor must divide model.heads"
        )
    least = min(plans, key=lambda plan: plan.memory.peak)
    tensor, _, stage, recompute = _way(least)
    hardware, layout = least.hardware, least.layout
    greatest = max(least.memory.kinds, key=lambda kind: least.memory.kinds[kind])
    return (
        f"no legal choice fits {hardware.name}: the smallest (parallel.tensor {tensor}, zero_stage {stage}, "
        f"micro_batch {layout.micro_batch}, recompute {str(recompute).lower()}) needs "
        f"{least.memory.peak / GIB:.1f} GiB a rank, {least.over:.1f} GiB over the "
        f"{hardware.usable_bytes / GIB:.1f} that may be used; most of it is {greatest} "
        f"({least.memory.kinds[greatest] / GIB:.1f} GiB); it would fit GPUs of "
        f"{least.memory.peak / GIB + hardware.reserve_gib:.0f} GiB{_more_gpus(least)}"
    )


def _more_gpus(least: Plan) -> str:
    """The least number of the same GPUs, in powers of two, on which the smallest choice would fit."""
    config, hardware = least.layout.config, least.hardware
    gpus = hardware.gpus
    while gpus < 4096:
        gpus *= 2
        try:
            plan = make_plan(config, hardware.sized(gpus), least.layout.labels)
        except UserError:
            continue
        if plan.fits:
            return f", or {gpus} of these"
    return ""
