"""The guard before a step: features that hold NaN or infinity are refused by name, and nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megaregion.errors import UserError


class NonFiniteFeatures(UserError):
    """Features hold NaN or infinity; ``rows`` are the rows' numbers in the micro-step's global order."""

    def __init__(self, head: str, rows: Sequence[int]) -> None:
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        super().__init__(
            f"{len(rows)} features of head {head} are not finite (rows {shown} of the micro-step); "
            "the step is refused and the centers stay as they are"
        )
        self.rows = list(rows)


class FiniteGuard:
    """Looks at features when it costs nothing to wait for the answer.

    On a processor that is at once. On a GPU the answer would stall the queue, so there it is asked for when
    the step ends, before anything is moved. A caller who judges the whole step himself, on all ranks at
    once, sets ``waits``: then nothing is raised here and :meth:`spoilt` says afterwards what was found.
    """

    def __init__(self, head: str) -> None:
        self._head = head
        self.waits = False
        """Leave the judgement to the caller."""
        self._unasked: list[tuple[Tensor, Tensor]] = []

    def watch(self, rows: Tensor, index: Tensor) -> None:
        """Note some rows of a micro-step.

        Args:
            rows: Features of all rows, [R, E].
            index: The rows that matter, int64 [n].

        Raises:
            NonFiniteFeatures: On a processor, if one of them is not finite.
        """
        self._unasked.append((index, ~rows.sum(1).isfinite()[index]))
        if rows.device.type == "cpu":
            self.ask()

    def ask(self) -> None:
        """Raise NonFiniteFeatures if any row noted since the last time was not finite."""
        if self.waits:
            return
        noted, self._unasked = self._unasked, []
        for index, bad in noted:
            if bool(bad.any()):
                raise NonFiniteFeatures(self._head, index[bad].tolist())

    def spoilt(self) -> list[list[int]]:
        """Rows that were not finite, for each :meth:`watch` since they were last forgotten."""
        return [index[bad].tolist() for index, bad in self._unasked]

    def forget(self) -> None:
        """Drop what was noted."""
        self._unasked = []
