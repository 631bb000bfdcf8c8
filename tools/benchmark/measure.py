"""Time, peak memory and the machine they were measured on."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


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
        synchronise(self.device)
        began = clock()
        work()
        synchronise(self.device)
        return clock() - began


def synchronise(device: torch.device) -> None:
    """Wait for a GPU's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Greatest memory of this process (or of its GPU) since the last ``reset``, in bytes.

    On a CPU it is the resident set, which Linux can restart counting; elsewhere 0 is all that is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        """Bytes in use."""
        gc.collect()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status_bytes("VmRSS")

    def reset(self) -> None:
        """Start counting anew."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Greatest number of bytes since ``reset``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    if not STATUS.exists():
        return 0
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def describe_host(device: torch.device) -> dict[str, str | int | float]:
    """The machine, as a benchmark's reader needs to know it."""
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
    return host


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
