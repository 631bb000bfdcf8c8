"""Stop requests: a signal asks, all ranks agree on the step (guard.py), the run saves and exits with 85.

Install the handler before torch is imported: a signal that arrives earlier would kill the rank.
"""

from __future__ import annotations

import signal
from types import FrameType

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

    def leave(self) -> None:
        """Ignore stop requests from now on; call it before the last barrier of all ranks.

        The first rank to exit with 85 makes srun terminate the others, which may still be tidying up: without
        this their exit code would tell of a signal instead of a saved run.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
