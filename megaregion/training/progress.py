"""Where this rank stands: its step and phase, noted in memory at every turn of the loop."""

from __future__ import annotations

import time

PHASES = ("start", "data", "forward", "head", "backward", "update", "agree", "save", "load")
"""Parts of a run, named in the watchdog's report."""


class Progress:
    """The last thing that this rank began; noting costs a fraction of a microsecond.

    All ranks of a run take the same turns, so the number of notes says who is behind.
    """

    __slots__ = ("phase", "since", "step", "turns")

    def __init__(self) -> None:
        self.phase = "start"
        """What the rank is doing, one of PHASES."""
        self.step = 0
        """The step it is in, from 1; 0 before the first."""
        self.turns = 0
        """Notes taken so far."""
        self.since = time.monotonic()
        """When the last note was taken, on the monotonic clock, in seconds."""

    def note(self, phase: str, step: int) -> None:
        """Say that a phase of a step (from 1) begins."""
        self.phase = phase
        self.step = step
        self.turns += 1
        self.since = time.monotonic()
