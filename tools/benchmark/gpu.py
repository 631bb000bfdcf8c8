"""The first minutes on a GPU: is it right, and how fast; every part that matters there, one by one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmark.measure import Stopwatch
from benchmark.part import FOLDER, Case, part
from megaregion.bounds import Choice, PositiveInt, Several

VIT_L = ("--width=1024", "--depth=24", "--heads=16", "--patch=14")
TOY = ("--width=64", "--depth=2", "--heads=2", "--size=32", "--batch=2", "--rounds=1")
RATE = "step, its products at the matrix rate"
"""The row of ``step`` whose ratio is the model FLOPs utilisation."""


@dataclass(frozen=True)
class Entry:
    """One command of the list."""

    name: str
    words: tuple[str, ...]
    """Part and flags."""
    toy: tuple[str, ...]
    """The same in a size that a processor does at once."""
    goals: Mapping[str, float] = field(default_factory=dict)
    """Least ratios, by how a case's name ends; of the full size."""


LIST = (
    Entry("parity", ("parity",), ("parity", "--width=64", "--depth=2")),
    Entry(
        "ViT-B/16", ("step", "--bf16", "--compile", "--batch=128", "--rounds=3"),
        ("step", *TOY), {RATE: 0.5},
    ),
    Entry(
        "ViT-L/14", ("step", *VIT_L, "--bf16", "--compile", "--batch=64", "--rounds=3"),
        ("step", *TOY), {RATE: 0.5},
    ),
    Entry(
        "ViT-L/14-336", ("step", *VIT_L, "--size=336", "--bf16", "--batch=32", "--rounds=3"),
        ("step", *TOY), {RATE: 0.55},
    ),
    Entry(
        "head", ("head", "--case=million"),
        ("head", "--classes=900", "--dim=16", "--rows=64", "--chunk-mib=1", "--repeats=1"),
        {"whole step, PartialFC": 4.0, "memory, PartialFC": 10.0, "its four GEMMs": 1 / 1.35},
    ),
    Entry(
        "labels", ("assign", "--case=mixture"),
        ("assign", "--case=mixture", "--vectors=2000", "--components=64"),
    ),
    Entry(
        "checkpoint", ("checkpoint", "--parameters=300000000"),
        ("checkpoint", "--parameters=300000", "--repeats=1"),
    ),
    Entry(
        "loader", ("loader", "--images=1024", "--workers=8"),
        ("loader", "--images=32", "--batch=8", "--workers=1", "--repeats=1"),
    ),
    Entry("fp8", ("step", *VIT_L, "--bf16", "--fp8", "--batch=64", "--rounds=3"), ("step", *TOY)),
)  # fmt: skip
"""What is asked first comes first: time may run out."""
ON_DISK = ("checkpoint", "loader")
"""Parts that write to the disk."""


@part(
    ("--minutes", PositiveInt, 8, "what has not begun by then is named and left out"),
    ("--only", Several(Choice(tuple(entry.name for entry in LIST))), None, "only these entries"),
    ("--sizes", Choice(("full", "toy")), "full", "toy: see that every command runs"),
    FOLDER,
)  # fmt: skip
def gpu(options: argparse.Namespace, watch: Stopwatch) -> Iterator[Case]:
    """All that a first look at a GPU should tell: parity, MFU, head, labels, checkpoint, loader, fp8.

    Every entry is a command of this tool in a process of its own. One that fails or takes too long is named
    in the table and costs the others nothing; the exit code is then 1. Nothing is installed or fetched.
    """
    ends = time.monotonic() + 60 * options.minutes
    for entry in LIST:
        if options.only and entry.name not in options.only:
            continue
        words = entry.toy if options.sizes == "toy" else entry.words
        if words[0] in ON_DISK:
            words = (*words, f"--folder={options.folder}")
        for case in run_entry(entry.name, (*words, f"--device={watch.device.type}"), entry.goals, ends):
            yield case if options.sizes == "full" else replace(case, goal=0.0)


def run_entry(name: str, words: tuple[str, ...], goals: Mapping[str, float], ends: float) -> Iterator[Case]:
    """Cases of one command, or one that says why there are none."""
    left = ends - time.monotonic()
    if left <= 0:
        yield Case(name, 0, 0, "", failure="no time was left; give more --minutes")
        return
    print(f"{name}: {' '.join(words)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), *words, f"--json={file}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            yield Case(name, 0, 0, "", failure=f"still running after {left:.0f} s")
            return
        # A part some of whose cases failed ends with 1, too, and has written them all.
        if not file.exists():
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            yield Case(name, 0, 0, "", failure=said[-1])
            return
        for found in json.loads(file.read_text())["cases"]:
            goal = next((goal for end, goal in goals.items() if found["case"].endswith(end)), found["goal"])
            unit, told = found["unit"], f"{name}, {found['case']}"
            yield Case(told, found["ours"], found["peer"], unit, goal, failure=found.get("failure", ""))
