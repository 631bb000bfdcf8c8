"""A part of the benchmarks: flags, a function that yields cases, and the report of one run on one machine."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmark.measure import Stopwatch
from megaregion.bounds import Choice, Folder
from megaregion.command_line import Parser
from megaregion.files import write_text
from megaregion.schemas.evaluation import aligned


@dataclass(frozen=True)
class Case:
    """One comparison."""

    case: str
    """What was compared, with its sizes."""
    ours: float
    peer: float
    unit: str
    """Unit of ours and peer."""
    goal: float = 0.0
    """Least ratio that was promised; 0 where none was."""
    two_sided: bool = False
    """Whether ours is a forecast of peer, so that the ratio may miss the goal either way."""
    failure: str = ""
    """Why nothing was measured, if something went wrong."""
    unmeasured: str = ""
    """Why nothing was measured, if nothing went wrong."""
    counts: Mapping[str, Any] | None = None
    """What was counted instead: kernels, gigabytes, tflop, mismatches, and waits by place."""

    @property
    def ratio(self) -> float:
        """How many times better ours is: peer / ours, so that more is better for times and memory alike."""
        return self.peer / self.ours if self.ours else math.inf

    @property
    def holds(self) -> bool:
        """Whether the goal is reached."""
        if self.failure or self.unmeasured:
            return False
        ratio = self.ratio
        if self.two_sided and ratio:
            ratio = min(ratio, 1 / ratio)
        return ratio >= self.goal

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        if self.failure:
            return (self.case, "", "", "", "", "", f"FAILED: {self.failure}")
        if self.unmeasured:
            goal = f"{self.goal:.2f}" if self.goal else ""
            return (self.case, "", "", self.unit, "", goal, f"unmeasured: {self.unmeasured}")
        numbers = (f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in (self.ours, self.peer))
        verdict = (f"{self.goal:.2f}", "holds" if self.holds else "MISSED") if self.goal else ("", "")
        return (self.case, *numbers, self.unit, f"{self.ratio:.2f}", *verdict)


Row = tuple[str, str, str, str, str]
"""Name of the goal or nothing, what is compared, the figures that are ours and the peer's, their unit."""


def cases(
    label: str,
    rows: Iterable[Row],
    figures: Mapping[str, float],
    goals: Mapping[str, float],
    failed: Mapping[str, str] | None = None,
) -> Iterator[Case]:
    """Cases of one size; rows with a figure that was not asked for are left out, what failed is named."""
    failed = failed or {}
    for goal, told, ours, peer, unit in rows:
        contestants = [name.partition(":")[0] for name in (ours, peer)]
        case = Case(f"{label}: {told}", 0.0, 0.0, unit, goals.get(goal, 0.0))
        if why := [f"{work}: {failed[work]}" for work in dict.fromkeys(contestants) if work in failed]:
            if all(name in {*failed, *figures} for name in (*contestants,)):
                yield replace(case, failure="; ".join(why))
        elif ours in figures and peer in figures:
            yield replace(case, ours=figures[ours], peer=figures[peer])


@dataclass(frozen=True)
class Report:
    """All cases of one run, and where it ran."""

    host: dict[str, Any]
    cases: Sequence[Case]

    def table(self) -> str:
        """The cases as aligned text."""
        head = ("case", "ours", "peer", "unit", "ratio", "goal", "")
        measured = [case.cells for case in self.cases if case.counts is None]
        text = aligned([head, *measured], left=(0, 3, 6))
        counted = [
            (
                case.case, f"{told['kernels']:,}", f"{told['gigabytes']:,.3f}", f"{told['tflop']:,.3f}",
                str(told["mismatches"]), str(sum(told["waits"].values())), ", ".join(told["waits"]),
            )
            for case in self.cases if (told := case.counts) is not None
        ]  # fmt: skip
        if not counted:
            return text
        head = ("asked of a GPU", "kernels", "GB", "TFLOP", "mismatches", "host waits", "where")
        return f"{text}\n\n{aligned([head, *counted], left=(0, 6))}"

    def write_json(self, path: Path) -> None:
        """Write ``{"host": ..., "cases": [...]}``, the form of every benchmark of the project."""
        # JSON has no infinity, which is the ratio to what took no time that can be measured.
        cases = [
            {**asdict(case), "ratio": case.ratio if case.ours else None, "holds": case.holds}
            for case in self.cases
        ]
        for case in cases:
            del case["two_sided"]
            if case["failure"] or case["unmeasured"]:
                case |= dict.fromkeys(("ours", "peer", "ratio"))
            for key in ("failure", "unmeasured", "counts"):
                if not case[key]:
                    del case[key]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"host": self.host, "cases": cases}, indent=2, default=str) + "\n")


Flag = tuple[str, Any, Any, str]
"""Name, kind, default and meaning, as :meth:`Parser.add_flag` takes them."""

CLOCK: Flag = (
    "--clock", Choice(("wall", "processor")), "wall",
    "processor counts only the time of processors, for a shared machine; use it with --threads 1",
)  # fmt: skip
FOLDER: Flag = ("--folder", Folder, Path(), "folder on the disk to measure; what is written there is removed")

Find = Callable[[argparse.Namespace, Stopwatch], Iterable[Case]]


@dataclass(frozen=True)
class Part:
    """What is measured together: ``tools/benchmark.py NAME``."""

    flags: tuple[Flag, ...]
    find: Find
    """Yields the cases; its docstring is the part's ``--help``."""

    def add_flags(self, parser: Parser) -> None:
        """Add its flags to a command."""
        for flag in self.flags:
            parser.add_flag(*flag)

    def measure(self, options: argparse.Namespace, device: torch.device, path: Path | None = None) -> Report:
        """Find all cases; a file has those that are found at any time."""
        names = [name.removeprefix("--").replace("-", "_") for name, *_ in self.flags]
        chosen = {name: getattr(options, name) for name in names}
        host = _host(device)
        watch = Stopwatch(device, chosen.get("clock") == "processor", chosen.get("seconds") or math.inf)
        report = Report({**host, **chosen}, found := [])
        for case in self.find(options, watch):
            found.append(case)
            # A part may choose the threads that it measures with.
            report.host["threads"] = torch.get_num_threads()
            if path is not None:
                report.write_json(path)
        return report


def part(*flags: Flag) -> Callable[[Find], Part]:
    """Make the function below a part with these flags."""
    return lambda find: Part(flags, find)


def _host(device: torch.device) -> dict[str, Any]:
    """The machine, as a benchmark's reader needs to know it."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        **gpu,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
