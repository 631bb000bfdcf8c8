"""Faults on purpose, for drills: one environment variable makes a real run hang, die or see NaN.

    MEGAREGION_FAULT="hang:rank=2:step=3"                for ever asleep in the middle of step 3
    MEGAREGION_FAULT="die:rank=1:step=4"                 SIGKILL to itself in the middle of step 4
    MEGAREGION_FAULT="die-in-save:rank=1:step=4"         SIGKILL to itself when the save after step 4 begins
    MEGAREGION_FAULT="nan:step=5"                        features become NaN before step 5's heads
    MEGAREGION_FAULT="nan-gradient:step=5:count=3"       the body's gradient becomes NaN, three times over
    MEGAREGION_FAULT="slow:rank=1:step=2:seconds=0.5"    sleeps so long in every forward from step 2 on
    MEGAREGION_FAULT="slow-save:step=5:seconds=3"        the first save from step 5 on takes so much longer
    MEGAREGION_FAULT="clock-jump:step=5:seconds=-90"     the rank's wall clock goes wrong by so much in step 5

Steps count from 1, as the log counts them. ``rank`` is 0 and ``count``, of steps tried, is 1 when not
given; ``start=0`` keeps a fault to a job's first start, ``start=1`` to its first restart. Several are joined
by commas. Unset, nothing here does anything.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megaregion.errors import UserError

VARIABLE = "MEGAREGION_FAULT"
KINDS = ("hang", "die", "die-in-save", "nan", "nan-gradient", "slow", "slow-save", "clock-jump")

AT_ONCE = ("nan", "nan-gradient", "clock-jump")
"""Kinds that act in their step or never."""


@dataclass
class Fault:
    """One fault that waits for its moment."""

    kind: str
    rank: int = 0
    step: int = 1
    count: int = 1
    """How often it acts from its step on, NaN and a jump in their step alone; slow acts without end."""
    seconds: float = 0.0
    """Length of one slow forward or save, or of a jump of the clock."""
    start: int | None = None


class Faults:
    """The faults of one rank."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = faults
        self._step, self._first_forward = 0, False

    @classmethod
    def of_rank(cls, rank: int) -> Faults:
        """The faults that the environment asks of this rank.

        Raises:
            UserError: The variable cannot be read.
        """
        faults = [_parse(part) for part in os.environ.get(VARIABLE, "").split(",") if part]
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls([fault for fault in faults if fault.rank == rank and fault.start in (None, start)])

    def begin_step(self, step: int) -> None:
        """Called when a step is tried, from 1."""
        self._step, self._first_forward = step, True

    def strike(self, phase: str, step: int) -> None:
        """Called where a phase of the clock begins, with the step that is being taken or was last taken."""
        if phase not in ("forward", "save"):
            return
        if phase == "save" and (fault := self._due("slow-save", step)):
            time.sleep(fault.seconds)
        if phase == "forward" and (fault := self._due("clock-jump", step)):
            true, seconds = time.time, fault.seconds
            time.time = lambda: true() + seconds
        if self._due("die" if phase == "forward" else "die-in-save", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if phase == "forward" and self._due("hang", step):
            while True:
                time.sleep(3600)
        for fault in self._faults:
            if fault.kind == "slow" and phase == "forward" and step >= fault.step:
                time.sleep(fault.seconds)

    def spoil(self, model: nn.Module) -> None:
        """Let what a model gives, or the gradient that it gets back, become NaN in a step's first forward."""
        if any(fault.kind in ("nan", "nan-gradient") for fault in self._faults):
            model.register_forward_hook(self._spoil)

    def _spoil(self, model: nn.Module, inputs: Any, given: Tensor) -> Tensor | None:
        first, self._first_forward = self._first_forward, False
        if not first:
            return None
        if self._due("nan", self._step):
            given = given * math.nan
        if self._due("nan-gradient", self._step):
            given.register_hook(lambda gradient: gradient * math.nan)
        return given

    def _due(self, kind: str, step: int) -> Fault | None:
        for fault in self._faults:
            # A start that repeats a step has to meet its NaN again, one that begins behind it must not.
            reached = step == fault.step if kind in AT_ONCE else step >= fault.step
            if fault.kind == kind and reached and fault.count > 0:
                fault.count -= 1
                return fault
        return None


def _parse(text: str) -> Fault:
    kind, *settings = text.strip().split(":")
    values: dict[str, str] = dict(item.partition("=")[::2] for item in settings)
    try:
        if kind not in KINDS or set(values) - {"rank", "step", "count", "seconds", "start"}:
            raise ValueError(text)
        numbers = {key: int(value) for key, value in values.items() if key != "seconds"}
        return Fault(kind, seconds=float(values.get("seconds", 0.0)), **numbers)
    except ValueError:
        raise UserError(
            f"{VARIABLE} must name faults as {', '.join(KINDS)} with :rank=, :step=, :count=, :start= or "
            f":seconds=, got {text!r}"
        ) from None
