"""Our transformer alone, beside MLCDVisionModel and the matrix rate: forward, and forward with backward.

Ratios are peer / ours. Every contestant has a process of its own, and they take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.contestant import Build, Work, contestants, take_turns
from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Report, cases
from benchmark.step import (
    Pooled,
    StepSizes,
    add_arguments,
    ideal_seconds,
    mlcd_model,
    square_images,
    square_product,
    step_sizes,
)

__all__ = ["add_arguments", "measure"]


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Measure one size, forward alone and with backward."""
    sizes, found = step_sizes(options), []
    watch = Stopwatch(device, options.clock == "processor")
    for backward, text in ((False, "forward"), (True, "forward + backward")):
        builds: dict[str, Build] = {
            "matrix": (square_product, (sizes, device)),
            "ours": (our_model, (sizes, device, backward)),
            "peer": (peer_model, (sizes, device, backward)),
        }
        if options.compile:
            builds["peer compiled"] = (peer_model, (sizes, device, backward, True))
        with contestants(builds, watch) as group:
            seconds = take_turns(group, options.rounds)
        ours, ideal = seconds["ours"], ideal_seconds(sizes, seconds["matrix"]) / (1 if backward else 3)
        found += [
            ("", f"{text}, MLCDVisionModel", ours, seconds["peer"], "s"),
            ("", f"{text}, its products at the matrix rate", ours, ideal, "s"),
        ]
        if options.compile:
            found.append(("", f"{text}, MLCDVisionModel + compile", ours, seconds["peer compiled"], "s"))
    return Report(describe_host(device, clock=options.clock), cases(sizes.label, {}, found))


def our_model(sizes: StepSizes, device: torch.device, backward: bool) -> Work:
    """Our transformer: forward, or forward and backward."""
    model = Pooled(sizes.model).to(device, sizes.dtype)
    return _passes(model, model, square_images(sizes, device), backward)


def peer_model(sizes: StepSizes, device: torch.device, backward: bool, compiled: bool = False) -> Work:
    """Transformers' MLCDVisionModel: forward, or forward and backward."""
    model = mlcd_model(sizes, device)
    forward: Any = torch.compile(model) if compiled else model

    def features(images: Tensor) -> Tensor:
        pooled: Tensor = forward(pixel_values=images).pooler_output
        return pooled

    return _passes(model, features, square_images(sizes, device), backward)


def _passes(model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, backward: bool) -> Work:
    def infer() -> None:
        with torch.inference_mode():
            forward(images)

    def learn() -> None:
        forward(images).float().square().sum().backward()
        model.zero_grad()

    return learn if backward else infer
