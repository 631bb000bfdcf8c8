"""Signals that ask a run to stop: all ranks agree on the step, save and leave."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from megaregion.errors import EARLY_EXIT, is_said

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EARLY = "asked to stop before the first step; there is nothing to save"


class StopRequest:
    """Remembers that somebody asked this process to stop.

    Until the first step there is nothing to save: a rank that is asked to stop while it starts leaves at
    once, also where it waits for ranks that will never come.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._starting = False

    def install(self) -> StopRequest:
        """Start to listen, before torch is imported: a signal that arrives earlier would kill the rank."""
        self._starting = True
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python runs a handler between two instructions, which a wait inside a library may never reach; the
        # number that the system's own handler writes here wakes a thread.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._leave_early, args=(reader,), name="signals", daemon=True).start()
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        return self

    def begin(self) -> None:
        """Steps begin: from now on a request is remembered, and the run saves before it leaves."""
        self._starting = False

    def leave(self) -> None:
        """Ignore stop requests from now on; call it before the last barrier of all ranks.

        The first rank to exit with 85 makes srun terminate the others, which may still be tidying up: without
        this their exit code would tell of a signal instead of a saved run.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _leave_early(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            if self._starting and any(number in STOP_SIGNALS for number in numbers):
                if not is_said(EARLY):
                    os.write(2, f"megaregion: {EARLY}\n".encode())
                os._exit(EARLY_EXIT)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
