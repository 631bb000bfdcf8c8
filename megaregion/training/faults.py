"""Faults: the loss guard refuses steps that have them, and drills bring them about on purpose.

A step whose loss or gradient is not finite, or far above the last ones, is not taken. All ranks judge the
same numbers, so a refused step moves nothing anywhere; the data goes on. After several in a row the run goes
back to its last checkpoint, on with the data behind them; after several returns it ends.

One environment variable makes a real run hang, die or see NaN:

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

import contextlib
import json
import math
import os
import signal
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaregion.config import GuardConfig
from megaregion.errors import UserError

LEAST_SPREAD = 0.02
"""Least deviation assumed, as a share of the median: a plateau has next to none of its own."""
COUNTS = ("consecutive", "skipped", "rollbacks")
"""What the guard counts, as a checkpoint keeps it."""
WAY_OUT = (
    "different samples point at the settings: lower optimizer.lr, and look at data.std, model.norm_eps and "
    "guard.spike; guard.jsonl in the run's folder has the samples"
)
"""What a run that refuses step after step should look at."""
MAD_TO_DEVIATION = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know together at the end of a step, before anything is updated."""

    stopping: bool
    """Whether any rank was asked to stop."""
    finite: bool
    """Whether loss and gradient norm are finite on every rank."""
    loss: float
    """The loss; 0 where it is not finite."""


def agree(stop: bool, loss: Tensor, norm: Tensor, group: Any) -> Agreement:
    """Join what all ranks know in one reduction, the only one on which the host waits; a collective.

    Loss and global gradient norm are 0-d, and the same on every rank as long as they are finite.
    """
    spoilt = ~(loss.isfinite() & norm.isfinite())
    asked = torch.full((), float(stop), dtype=torch.float64, device=loss.device)
    told = torch.stack([asked, spoilt.double(), torch.nan_to_num(loss.double(), 0.0, 0.0, 0.0)])
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    stopping, unhealthy, value = told.tolist()
    return Agreement(stopping > 0, unhealthy == 0, value)


class LossGuard:
    """Judges losses by the last accepted ones; its memory is part of the checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._accepted: deque[float] = deque(maxlen=config.window)
        self.consecutive = 0
        """Refused steps since the last one that was taken."""
        self.skipped = 0
        """Refused steps of the whole run."""
        self.rollbacks = 0
        """Returns to a checkpoint."""

    @property
    def enabled(self) -> bool:
        """Whether steps are judged at all."""
        return self._config.enabled

    @property
    def wants_rollback(self) -> bool:
        """Whether so many steps were refused in a row that the state itself is suspect."""
        return self.consecutive >= self._config.rollback_after

    @property
    def bound(self) -> float:
        """Loss above which a step is refused; infinite until the window is full."""
        if self._config.spike == 0 or len(self._accepted) < self._config.window:
            return math.inf
        median = statistics.median(self._accepted)
        spread = MAD_TO_DEVIATION * statistics.median(abs(loss - median) for loss in self._accepted)
        return median + self._config.spike * max(spread, LEAST_SPREAD * abs(median))

    def judge(self, agreement: Agreement) -> str | None:
        """Accept a step or say why not; every rank comes to the same answer."""
        reason = None
        if not agreement.finite:
            reason = "the loss or the gradient norm is not finite"
        elif agreement.loss > (bound := self.bound):
            reason = f"the loss {agreement.loss:.4g} is a spike beyond the bound {bound:.4g}"
        if reason is None or not self.enabled:
            self.consecutive = 0
            if agreement.finite:
                self._accepted.append(agreement.loss)
            return None
        self.consecutive += 1
        self.skipped += 1
        return reason

    def check_rollback(self) -> None:
        """See whether the run may go back once more.

        Raises:
            UserError: It has gone back guard.max_rollbacks times already.
        """
        if self.rollbacks >= self._config.max_rollbacks:
            raise UserError(
                f"the loss guard went back {self.rollbacks} times (guard.max_rollbacks) and refused "
                f"{self.consecutive} steps in a row again; {WAY_OUT}"
            )

    def went_back(self, skipped: int, rollbacks: int) -> None:
        """After a return to a checkpoint, whose own counts of refused steps and returns are older."""
        self.skipped, self.rollbacks, self.consecutive = skipped, rollbacks + 1, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in JSON's types."""
        return {"accepted": list(self._accepted), **{name: getattr(self, name) for name in COUNTS}}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what :meth:`state` gave; None, of a checkpoint without a guard, starts afresh."""
        state = state or LossGuard(self._config).state()
        self._accepted = deque(state["accepted"], maxlen=self._config.window)
        for name in COUNTS:
            setattr(self, name, state[name])


def write_refusal(file: Path, refusal: dict[str, Any]) -> None:
    """Add one refused step to guard.jsonl; a full disk loses the line, which the log has too."""
    with contextlib.suppress(OSError), file.open("a") as stream:
        stream.write(json.dumps(refusal) + "\n")


# Faults on purpose.

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

    def _spoil(self, model: nn.Module, inputs: Any, given: Any) -> Any:
        first, self._first_forward = self._first_forward, False
        if not first:
            return None
        embeddings, *others = given if isinstance(given, tuple) else (given,)
        if self._due("nan", self._step):
            embeddings = embeddings * math.nan
        if self._due("nan-gradient", self._step):
            embeddings.register_hook(lambda gradient: gradient * math.nan)
        return (embeddings, *others) if others else embeddings

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
