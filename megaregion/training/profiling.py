"""``--profile``: what the processor and the GPU did in some steps, as files that other tools show."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megaregion.errors import UserError

LOG = logging.getLogger("megaregion")

STEPS = 3
"""Steps that are profiled when none are named."""
LISTED = 50
"""Operations listed in a profile's memory file, by what they allocate."""


def parse_window(text: str) -> tuple[int, int]:
    """First and last step of ``FIRST`` or ``FIRST:LAST``.

    Raises:
        UserError: It is neither.
    """
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last) if last else int(first) + STEPS - 1
    except ValueError:
        raise UserError(f"--profile must be a step or FIRST:LAST, got {text}") from None
    if not 1 <= window[0] <= window[1]:
        raise UserError(f"--profile must name rising steps from 1 on, got {text}")
    return window


class StepProfiler:
    """What the processor and the GPU did in a window of steps, as files that other tools show.

    rank-00.trace.json.gz     for Chrome (chrome://tracing), Perfetto, TensorBoard
    rank-00.memory.json       memory by operation; the peak of the process or of its GPU
    rank-00.snapshot.pickle   every allocation of a GPU, for pytorch.org/memory_viz
    """

    def __init__(self, window: tuple[int, int] | None, run: Path, rank: int, device: torch.device) -> None:
        """Profile nothing yet; without a window, never."""
        self._window = window
        self._stem = run / "profile" / f"rank-{rank:02d}"
        self._device, self._on_gpu = device, device.type == "cuda"
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Call it before a step (from 1): starts where the window does."""
        if self._profile is None and self._window and self._window[0] <= step <= self._window[1]:
            activities = [ProfilerActivity.CPU]
            if self._on_gpu:
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.memory._record_memory_history()
            self._profile = profile(activities=activities, profile_memory=True, record_shapes=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call it after a step: writes the files behind the window's last."""
        if self._window and step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, also where the run ends inside the window."""
        if self._profile is None:
            return
        self._profile.stop()
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(f"{self._stem}.trace.json.gz")
        Path(f"{self._stem}.memory.json").write_text(json.dumps(self._memory(), indent=1) + "\n")
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(f"{self._stem}.snapshot.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        LOG.info("profile written to %s.*", self._stem)
        self._profile = self._window = None

    def _memory(self) -> dict[str, Any]:
        size = "self_device_memory_usage" if self._on_gpu else "self_cpu_memory_usage"
        found = [
            (int(getattr(event, size)), event.key, event.count) for event in self._profile.key_averages()
        ]
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "peak_bytes": peak,
            "operations": [
                {"name": name, "bytes": size, "calls": calls}
                for size, name, calls in sorted(found, reverse=True)[:LISTED]
            ],
        }
