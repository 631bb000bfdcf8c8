"""``benchmark.py model``: our transformer beside MLCDVisionModel, without engine and optimizer."""

from __future__ import annotations

import argparse

import torch

from benchmark.commands.step import add_arguments, step_sizes
from benchmark.measure import Stopwatch, describe_host
from benchmark.report import Report

HELP = "our transformer alone against MLCDVisionModel and the matrix rate"
DESCRIPTION = "Ratios are peer / ours. Every contestant has a process of its own, and they take turns."

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "measure"]


def measure(options: argparse.Namespace, device: torch.device) -> Report:
    """Measure one size, forward alone and with backward."""
    from benchmark.compare_steps import compare_models

    watch = Stopwatch(device, processor=options.clock == "processor")
    cases = compare_models(step_sizes(options), watch, options.rounds, options.compile)
    return Report({**describe_host(device), "clock": options.clock}, cases)
