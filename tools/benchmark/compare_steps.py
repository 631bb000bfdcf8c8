"""The cases of the step and model benchmarks: who takes turns with whom, and what is divided by what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmark.contestant import Contestant, take_turns
from benchmark.measure import Stopwatch
from benchmark.report import Case
from benchmark.step import (
    PRODUCT_SIDE,
    StepSizes,
    native_grids,
    our_model,
    our_packed_step,
    our_step,
    peer_model,
    peer_step,
    products,
)
from megaregion.models.flops import encoder_flops

Builds = dict[str, tuple[Any, tuple[Any, ...]]]
"""By name: what makes the work, and what it takes behind the sizes and the device."""

REGIONS = 10


def compare_steps(
    sizes: StepSizes, goals: dict[str, float], watch: Stopwatch, rounds: int, compiled: bool
) -> list[Case]:
    """Measure whole training steps, heads excluded.

    Args:
        sizes: The size.
        goals: Least ratio by name of the comparison: peer, rate, memory, regions, packed, padding.
        watch: The clock, on the device to run on.
        rounds: Timed steps of each; the fastest counts.
        compiled: Whether to run the peer, and ours, under torch.compile too.
    """
    builds: Builds = {
        "matrix": (products, ()),
        "fastest": (products, (True,)),
        "ours": (our_step, ()),
        "peer": (peer_step, ()),
        "regions": (our_step, (REGIONS,)),
        "trained": (our_step, (REGIONS, True)),
        "cheap": (our_step, (0, False, False, "cheap")),
        "packed": (our_packed_step, ()),
        "padded": (our_packed_step, (True,)),
    }
    if compiled:
        builds |= {"peer compiled": (peer_step, (True,)), "compiled": (our_step, (0, False, True, "keep"))}
    with contestants(builds, sizes, watch) as group:
        seconds = take_turns(group, rounds)
        memory = {name: group[name].memory() / 1e6 for name in ("ours", "peer", "cheap")}
    ideal, fastest = (_ideal(sizes, seconds[name]) for name in ("matrix", "fastest"))
    # As trained, the last block leaves out what nobody but the next block's patches would read.
    found = [
        ("peer", "step, MLCDVisionModel + AdamW", seconds["ours"], seconds["peer"], "s"),
        ("rate", "step, its products at the matrix rate", seconds["ours"], ideal, "s"),
        ("", "step, its products at the rate of the fastest library", seconds["ours"], fastest, "s"),
        ("", "MLCDVisionModel + AdamW, its products at the matrix rate", seconds["peer"], ideal, "s"),
        ("memory", "peak memory, MLCDVisionModel + AdamW", memory["ours"], memory["peer"], "MB"),
        ("", "step, norms and GELU made again, MLCDVisionModel", seconds["cheap"], seconds["peer"], "s"),
        ("", "its peak memory, MLCDVisionModel + AdamW", memory["cheap"], memory["peer"], "MB"),
        ("packed", "packed 1:3 to 3:1, padded to squares", seconds["packed"], seconds["padded"], "s"),
        ("padding", "tokens of a packed step, without padding", *_tokens(sizes), "tokens"),
        ("regions", f"step with {REGIONS} regions, without", seconds["regions"], seconds["ours"], "s"),
        ("", "the same as trained", seconds["trained"], seconds["ours"], "s"),
    ]
    if compiled:
        found += [
            ("", "step, MLCDVisionModel + compile + AdamW", seconds["ours"], seconds["peer compiled"], "s"),
            ("", "step with train.compile, without", seconds["compiled"], seconds["ours"], "s"),
        ]
    return _cases(sizes, goals, found)


def compare_models(sizes: StepSizes, watch: Stopwatch, rounds: int, compiled: bool) -> list[Case]:
    """Measure the transformer alone, without engine and optimizer; the same arguments."""
    found = []
    for backward, text in ((False, "forward"), (True, "forward + backward")):
        builds: Builds = {
            "matrix": (products, ()),
            "ours": (our_model, (backward,)),
            "peer": (peer_model, (backward,)),
        }
        if compiled:
            builds["peer compiled"] = (peer_model, (backward, True))
        with contestants(builds, sizes, watch) as group:
            seconds = take_turns(group, rounds)
        ideal = _ideal(sizes, seconds["matrix"]) / (1 if backward else 3)
        found += [
            ("", f"{text}, MLCDVisionModel", seconds["ours"], seconds["peer"], "s"),
            ("", f"{text}, its products at the matrix rate", seconds["ours"], ideal, "s"),
        ]
        if compiled:
            found.append(
                ("", f"{text}, MLCDVisionModel + compile", seconds["ours"], seconds["peer compiled"], "s")
            )
    return _cases(sizes, {}, found)


@contextmanager
def contestants(builds: Builds, sizes: StepSizes, watch: Stopwatch) -> Iterator[dict[str, Contestant]]:
    """Start a process for each, and end all of them."""
    started: dict[str, Contestant] = {}
    try:
        for name, (build, arguments) in builds.items():
            taken = (sizes, str(watch.device), *arguments)
            started[name] = Contestant(build, taken, watch.device, processor=watch.processor)
        yield started
    finally:
        for contestant in started.values():
            contestant.close()


def _tokens(sizes: StepSizes) -> tuple[float, float]:
    """Tokens that a packed step computes with, and those that are patches or class tokens of an image."""
    from megaregion.models.rotary import packed_rotation

    grids = native_grids(sizes)
    computed = packed_rotation(torch.zeros(sizes.model.head_dim // 2), grids, 1e4).cos.shape[0]
    return float(computed), float(sum(1 + rows * columns for rows, columns in grids))


def _ideal(sizes: StepSizes, product: float) -> float:
    """Seconds of a training step's products at the rate of one square product that took so many seconds."""
    operations = encoder_flops(sizes.model, 0, 0).training * sizes.batch
    return operations / (2 * PRODUCT_SIDE**3) * product


def _cases(
    sizes: StepSizes, goals: dict[str, float], found: list[tuple[str, str, float, float, str]]
) -> list[Case]:
    return [
        Case(f"{sizes.label}: {text}", own, other, goals.get(name, 0.0), unit)
        for name, text, own, other, unit in found
    ]
