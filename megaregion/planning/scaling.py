"""Weak scaling: the same images on every rank, from 8 to 1,024 ranks of the same machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megaregion.errors import UserError
from megaregion.planning.plan import Plan, make_plan

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


def weak_scaling(plan: Plan, sizes: Sequence[int] = SIZES) -> list[Plan]:
    """Plans of the same run on more and fewer ranks, the global batch growing with them.

    Sizes that do not suit parallel.tensor, or that need parts of a node, are left out.
    """
    config, plans = plan.layout.config, []
    for gpus in sizes:
        hardware = plan.hardware.sized(gpus)
        if gpus % plan.layout.tensor or gpus % hardware.gpus_per_node:
            continue
        batch = plan.layout.images * gpus // plan.layout.tensor
        train = dataclasses.replace(config.train, global_batch=batch, micro_batch=plan.layout.micro_batch)
        # Draws keep their number of rows where it divides a micro-step's, else they take the next that does.
        images = plan.layout.micro_batch * gpus // plan.layout.tensor
        drawn = next((d for d in range(config.head.draw_images, images) if d and images % d == 0), 0)
        head = dataclasses.replace(config.head, draw_images=drawn)
        try:
            scaled = make_plan(
                dataclasses.replace(config, train=train, head=head),
                hardware,
                plan.layout.labels,
                plan.samples,
            )
        except UserError:
            continue
        plans.append(scaled)
    return plans
