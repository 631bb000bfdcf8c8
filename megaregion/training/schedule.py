"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from megaregion.config import RunConfig


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of a step: linear warm-up from 0, then cosine decay to min_lr_ratio of the peak.

    Args:
        config: The run.
        step: Steps already taken; the first step has 0.
    """
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    span = max(1, config.train.steps - optimizer.warmup_steps)
    progress = min(1.0, (step - optimizer.warmup_steps) / span)
    ratio = optimizer.min_lr_ratio
    return optimizer.lr * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
