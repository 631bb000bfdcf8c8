"""Stop requests: a signal asks, all ranks agree on the step, the run saves and exits with 85.

Install the handler before torch is imported: a signal that arrives earlier would kill the rank.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that somebody asked this process to stop."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> StopRequest:
        """Start to listen; returns itself."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self, group: Any, device: Any) -> bool:
        """Whether any rank was asked to stop; a collective, so that all stop after the same step."""
        import torch
        import torch.distributed as dist

        asked = torch.tensor(float(self.received is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=group)
        return bool(asked.item())
