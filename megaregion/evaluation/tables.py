"""One measure's outcome: a table with a row per encoder and an estimate per column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megaregion.evaluation.estimates import Estimate


@dataclass(frozen=True)
class Column:
    """One number of a table."""

    key: str
    """Name in JSON and TensorBoard."""
    title: str
    """Head of the column."""
    chance: float | None = None
    """What knowing nothing of the image gives: the most frequent answer, or a random one."""


@dataclass(frozen=True)
class Table:
    """What one measure found of every encoder."""

    key: str
    """Name in JSON and TensorBoard."""
    title: str
    """Name on the page."""
    told: str
    """One or two sentences: what is asked of whom, and how many."""
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[Estimate | None, ...]]
    """By encoder, one estimate a column; None where the encoder cannot say."""
    chance: str = "chance"
    """What the columns' chance stands for."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Further words on an encoder's row."""

    def estimate(self, encoder: str, column: str) -> Estimate | None:
        """One cell.

        Raises:
            KeyError: There is no such row or column.
        """
        place = {each.key: place for place, each in enumerate(self.columns)}[column]
        return self.rows[encoder][place]
