"""Time, and the machine that it was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megaregion.parallel import topology
from megaregion.parallel.topology import Topology


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on one device."""

    device: torch.device
    processor: bool = False
    """Count this process's processor time instead of the wall's: on a machine that others use at the same
    time, with one thread, it is what the wall clock would show if they did not."""

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds of one call, a GPU's queue included."""
        clock = time.process_time if self.processor else time.perf_counter
        self._synchronise()
        began = clock()
        work()
        self._synchronise()
        return clock() - began

    def fastest(self, work: Callable[[], object], repeats: int) -> float:
        """Seconds of the fastest of some calls."""
        return min(self.seconds(work) for _ in range(repeats))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses between the wall's and the processor's time."""
    parser.add_argument(
        "--clock",
        choices=["wall", "processor"],
        default="wall",
        help="processor counts only the time of processors, for a shared machine; use it with --threads 1",
    )


def alone(device: torch.device) -> Topology:
    """The topology of this process alone, whatever a launcher says; torch keeps its threads."""
    for key in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        os.environ.pop(key, None)
    threads = torch.get_num_threads()
    place = topology.join(1)
    torch.set_num_threads(threads)
    return replace(place, device=device)


def describe_host(device: torch.device, **facts: str | int | float) -> dict[str, str | int | float]:
    """The machine and further facts, as a benchmark's reader needs to know them."""
    host: dict[str, str | int | float] = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        host["gpu"] = torch.cuda.get_device_name(device)
    return {**host, **facts}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
