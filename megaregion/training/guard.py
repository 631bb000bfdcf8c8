"""The loss guard: a step whose loss or gradient is not finite, or far above the last ones, is not taken.

All ranks judge the same numbers, so a refused step moves nothing anywhere; the data goes on. After several in
a row the run goes back to its last checkpoint, on with the data behind them; after several returns it ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
