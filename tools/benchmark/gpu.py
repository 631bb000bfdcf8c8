"""The first minutes on a GPU: is it right, and how fast; every part that matters there, one by one."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmark import parts
from benchmark.measure import KernelWatch, Stopwatch, passing_folder
from benchmark.part import FOLDER, Case, Part, part
from megaregion.bounds import Choice, PositiveInt, Several
from megaregion.command_line import Parser

VIT_L = ("--width=1024", "--depth=24", "--heads=16", "--patch=14")
TOY = ("--width=64", "--depth=1", "--heads=2", "--size=32", "--batch=2", "--rounds=1", "--bf16")
BESIDE = ("--contestants", "ideal", "ours", "compiled", "peer-compiled")
PACKED = ("--contestants", "packed", "padded")
STEPS = (
    ": step, MFU: its products at the matrix rate",
    ": step with train.compile, MFU: its products at the matrix rate",
)
"""How rows of ``step`` end whose ratio is our model FLOPs utilisation."""
AS_FAST = {"step, MLCDVisionModel + compile + AdamW": 1.0}
TINY = {
    "encoder": {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "image_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
    },
    "sam": {
        "model_type": "sam",
        "vision_config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
            "patch_size": 8, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 16,
            "num_pos_feats": 8,
        },
        "prompt_encoder_config": {
            "hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4,
        },
        "mask_decoder_config": {
            "hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_depth": 2, "iou_head_hidden_dim": 16,
        },
    },
}  # fmt: skip
"""Settings of the toy's networks."""


@dataclass(frozen=True)
class Entry:
    """One command of the list."""

    name: str
    seconds: int
    """What it may take of 8 minutes; what is left goes to those that follow."""
    words: tuple[str, ...]
    """Part and flags."""
    toy: tuple[str, ...]
    """The same in a size that a processor does at once."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """Least ratios, by how a case's name ends; of the full size."""


LIST = (
    Entry("parity", 55, ("parity",), ("parity", "--width=64", "--depth=1")),
    Entry(
        "ViT-L/14", 85, ("step", *VIT_L, "--bf16", "--batch=64", *BESIDE), ("step", *TOY, *BESIDE),
        {**dict.fromkeys(STEPS, 0.5), **AS_FAST},
    ),
    Entry(
        "head", 40, ("head", "--classes=1000000", "--dim=768", "--rows=8192", "--chunk-mib=256", "--bf16"),
        ("head", "--classes=900", "--dim=16", "--rows=64", "--chunk-mib=1", "--repeats=1", "--bf16"),
        {"whole step, PartialFC": 4.0, "memory, PartialFC": 10.0, "its four GEMMs": 1 / 1.35},
    ),
    Entry(
        "ViT-L/14-336", 75, ("step", *VIT_L, "--size=336", "--bf16", "--batch=32", *BESIDE),
        ("step", *TOY, *BESIDE), {**dict.fromkeys(STEPS, 0.55), **AS_FAST},
    ),
    Entry(
        "ViT-B/16", 65, ("step", "--bf16", "--batch=128", *BESIDE), ("step", *TOY, *BESIDE),
        {**dict.fromkeys(STEPS, 0.5), **AS_FAST},
    ),
    Entry("CLIP, SAM", 40, ("engines",), ("engines", "--grid=2", "--repeats=1")),
    Entry(
        "packed", 35, ("step", *VIT_L, "--bf16", "--batch=64", *PACKED, "regions", "ours"),
        ("step", *TOY, *PACKED),
        {"padded to squares": 1.25, "without padding": 0.97, "regions, without": 1 / 1.06},
    ),
    Entry(
        "labels", 25, ("assign", "--case=mixture"),
        ("assign", "--case=mixture", "--vectors=2000", "--components=64"),
    ),
    Entry(
        "checkpoint", 20, ("checkpoint", "--parameters=100000000", "--repeats=1"),
        ("checkpoint", "--parameters=300000", "--repeats=1"),
    ),
    Entry(
        "loader", 20, ("loader", "--images=1024", "--workers=8"),
        ("loader", "--images=32", "--batch=8", "--workers=1", "--repeats=1"),
    ),
    Entry(
        "fp8", 20, ("step", *VIT_L, "--bf16", "--batch=64", "--contestants", "ours", "fp8"),
        ("step", *TOY, "--contestants", "ours", "fp8"), {"train.fp8, without": 1.1},
    ),
)  # fmt: skip
"""What is asked first comes first: time may run out."""
ON_DISK = ("checkpoint", "loader")
"""Parts that write to the disk."""


@part(
    ("--minutes", PositiveInt, 8, "what has not ended by then is named and left out"),
    ("--only", Several(Choice(tuple(entry.name for entry in LIST))), None, "only these entries"),
    ("--sizes", Choice(("full", "toy")), "full", "toy: see that every command runs"),
    ("--fake", bool, False, "count what is asked of a GPU on fake tensors; needs none, only g++"),
    FOLDER,
)
def gpu(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """All that a first look at a GPU should tell: parity, MFU, head, CLIP and SAM, labels, disk, loader, fp8.

    Every entry is a command of this tool in a process of its own, with its share of the time and what those
    before it have left. One that fails or takes too long is named in the table and costs the others nothing;
    the exit code is then 1. Nothing is installed or fetched. With --fake all run in this process on tensors
    without numbers: kernels, bytes, operations, host waits and mismatches of devices are counted, no times.
    """
    ends, scale = time.monotonic(), 60 * options.minutes / sum(entry.seconds for entry in LIST)
    with passing_folder(options.folder) as folder:
        for entry in LIST:
            ends += scale * entry.seconds
            if options.only and entry.name not in options.only:
                continue
            words = _words(entry, options, folder)
            print(f"{entry.name}: {' '.join(words)}", file=sys.stderr, flush=True)
            if options.fake:
                found = count_entry(entry, words)
            else:
                device = f"--device={watch.device.type}"
                found = run_entry(entry.name, (*words, device), entry.goals, ends)
            for case in found:
                yield case if options.sizes == "full" else replace(case, goal=0.0)


def _words(entry: Entry, options: argparse.Namespace, folder: Path) -> tuple[str, ...]:
    """The command of an entry."""
    words = entry.toy if options.sizes == "toy" else entry.words
    if words[0] in ON_DISK:
        return (*words, f"--folder={options.folder}")
    if words[0] == "engines" and options.sizes == "toy":
        for name, settings in TINY.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(settings))
            words = (*words, f"--{name}={folder / name}")
    return words


def run_entry(name: str, words: tuple[str, ...], goals: Mapping[str, float], ends: float) -> Iterator[Case]:
    """Cases of one command, and one that says why there are no more."""
    left = ends - time.monotonic()
    if left <= 0:
        yield Case(name, 0, 0, "", failure="no time was left; give more --minutes")
        return
    if words[0] == "step":
        # It then has time to tell of the others.
        words = (*words, f"--seconds={max(1, int(0.85 * left))}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), *words, f"--json={file}"]
        failure, said = "", ""
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, said = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            failure = f"still running after {left:.0f} s"
        finally:
            # With all that it has started, which would keep the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # Each case is in the file as soon as it is found.
        cases = json.loads(file.read_text())["cases"] if file.exists() else []
        for found in cases:
            yield _case(f"{name}, {found['case']}", found, goals)
        if process.returncode and not any("failure" in found for found in cases):
            failure = failure or (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        if failure:
            yield Case(name, 0, 0, "", failure=failure)


def _case(told: str, found: Mapping[str, Any], goals: Mapping[str, float]) -> Case:
    goal = next((goal for end, goal in goals.items() if found["case"].endswith(end)), found["goal"])
    if why := found.get("failure"):
        # What may be left out is no failure where it is not installed.
        kind = "unmeasured" if "pip install" in why else "failure"
        return Case(told, 0, 0, found["unit"], goal, **{kind: why})
    return Case(told, found["ours"], found["peer"], found["unit"], goal)


@cache
def _counted(words: tuple[str, ...]) -> tuple[list[Case], KernelWatch]:
    """Cases of one command on fake tensors; several entries have the same in their small size."""
    from megaregion.planning.fake_cuda import DEVICE, fake_cuda
    from megaregion.planning.kernels import KernelCounter

    measured, options = _part_of(words)
    watch, found = KernelWatch(DEVICE), list[Case]()
    try:
        # What is asked between the works counts nowhere, but needs answers for numbers that are not there.
        with fake_cuda(), KernelCounter(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found += measured.find(options, watch)
    except Exception as error:
        found.append(Case(words[0], 0, 0, "", failure=watch.failure(words[0], error)))
    return found, watch


def count_entry(entry: Entry, words: tuple[str, ...]) -> Iterator[Case]:
    """Cases of one command, unmeasured, and what each of its works asks of a GPU."""
    found, watch = _counted(words)
    for case in found:
        goals = (goal for end, goal in entry.goals.items() if case.case.endswith(end))
        case = replace(case, case=f"{entry.name}, {case.case}", goal=next(goals, case.goal))
        if any(case.failure.endswith(why) for why in watch.lacking):
            case = replace(case, failure="", unmeasured=case.failure)
        elif not case.failure and (math.isnan(case.ours) or math.isnan(case.peer)):
            case = replace(case, unmeasured="fake tensors take no time")
        yield case
    for name, tally in watch.tallies.items():
        counts = {
            "kernels": tally.calls, "gigabytes": tally.moved.total() / 1e9, "tflop": tally.flops / 1e12,
            "mismatches": watch.mismatches.count(name), "waits": dict(Counter(tally.waits)),
        }  # fmt: skip
        yield Case(f"{entry.name}, {name}", 0, 0, "", counts=counts)


def _part_of(words: tuple[str, ...]) -> tuple[Part, argparse.Namespace]:
    """A part and its options, as the tool reads them."""
    module = next(module for name, module, _ in parts() if name == words[0])
    found: Part = getattr(importlib.import_module(f"benchmark.{module}"), words[0])
    parser = Parser()
    found.add_flags(parser)
    return found, parser.parse_args(words[1:])
