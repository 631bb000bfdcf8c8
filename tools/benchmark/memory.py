"""Peak memory: of this process or its GPU, and of a command with all that it starts."""

from __future__ import annotations

import gc
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Greatest memory of this process (or of its GPU) since the last ``reset``, in bytes.

    On a CPU it is the resident set, which Linux can restart counting; elsewhere 0 is all that is known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda: Any = None
        if device.type == "cuda":
            # Not above: the demo watches its commands without torch, whose pages it would share with them.
            import torch

            self._cuda = torch.cuda

    def now(self) -> int:
        """Bytes in use."""
        gc.collect()
        if self._cuda:
            held: int = self._cuda.memory_allocated(self._device)
            return held
        return status_bytes("VmRSS")

    def reset(self) -> None:
        """Start counting anew."""
        gc.collect()
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self._device)
        elif STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")

    def of(self, work: Callable[[], object]) -> int:
        """Greatest number of bytes in use during a call."""
        self.reset()
        work()
        return self.peak()

    def peak(self) -> int:
        """Greatest number of bytes since ``reset``."""
        if self._cuda:
            most: int = self._cuda.max_memory_allocated(self._device)
            return most
        return status_bytes("VmHWM")


def peak_until_end(process: subprocess.Popen[Any]) -> int:
    """Wait for a process; gives the most bytes that all below this one held meanwhile, 0 without Linux.

    Looks are a second apart, or further where they would cost more than a hundredth of a core: a shorter peak
    can be missed.
    """
    peak = 0
    while process.poll() is None:
        began = time.perf_counter()
        peak = max(peak, descendants_bytes(os.getpid()))
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, 100 * (time.perf_counter() - began)))
    return peak


def descendants_bytes(root: int) -> int:
    """Bytes of all processes below one; what they share counts once, by its proportional share (PSS)."""
    return sum(map(_shared_size, psutil.Process(root).children(recursive=True)))


def _shared_size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    # It has just ended, or this system does not count shares.
    except (psutil.Error, AttributeError):
        return 0


def status_bytes(key: str, process: int | str = "self") -> int:
    """A figure of a process in bytes, 0 without Linux: VmRSS, VmHWM ..."""
    path = Path(f"/proc/{process}/status")
    if not path.exists():
        return 0
    # A process that has ended without being waited for has no memory.
    lines = [line for line in path.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
