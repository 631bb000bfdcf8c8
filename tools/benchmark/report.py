"""What a benchmark reports: one line per case, each with a peer, a ratio and a goal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megaregion.tables import aligned


@dataclass(frozen=True)
class Case:
    """One comparison."""

    case: str
    """What was compared, with its sizes."""
    ours: float
    peer: float
    goal: float
    """Least ratio that was promised; 0 where none was."""
    unit: str
    """Unit of ours and peer."""
    two_sided: bool = False
    """Whether ours is a forecast of peer, so that the ratio may miss the goal either way."""

    @property
    def ratio(self) -> float:
        """How many times better ours is: peer / ours, so that more is better for times and memory alike."""
        return self.peer / self.ours if self.ours else math.inf

    @property
    def holds(self) -> bool:
        """Whether the goal is reached."""
        ratio = self.ratio
        if self.two_sided and ratio:
            ratio = min(ratio, 1 / ratio)
        return ratio >= self.goal


@dataclass
class Report:
    """All cases of one run, and where it ran."""

    host: dict[str, str | int | float]
    cases: list[Case] = field(default_factory=list)

    def table(self) -> str:
        """The cases as aligned text."""
        head = ("case", "ours", "peer", "unit", "ratio", "goal", "")
        return aligned([head, *map(_cells, self.cases)], left=(0, 3))

    def write_json(self, path: Path) -> None:
        """Write ``{"host": ..., "cases": [...]}``, the form of every benchmark of the project."""
        # JSON has no infinity, which is the ratio to what took no time that can be measured.
        cases = [
            {**asdict(case), "ratio": case.ratio if case.ours else None, "holds": case.holds}
            for case in self.cases
        ]
        for case in cases:
            del case["two_sided"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"host": self.host, "cases": cases}, indent=2) + "\n")


def cases(
    label: str, goals: Mapping[str, float], found: Iterable[tuple[str, str, float, float, str]]
) -> list[Case]:
    """Cases of one size.

    Args:
        label: The size.
        goals: Least ratios by name.
        found: Name of the goal or nothing, what was compared, ours, peer, unit.
    """
    return [
        Case(f"{label}: {text}", ours, peer, goals.get(name, 0.0), unit)
        for name, text, ours, peer, unit in found
    ]


def _cells(case: Case) -> tuple[str, ...]:
    numbers = [f"{number:.3g}" if number < 1000 else f"{number:.0f}" for number in (case.ours, case.peer)]
    verdict = ("", "") if case.goal == 0 else (f"{case.goal:.2f}", "holds" if case.holds else "MISSED")
    return (case.case, *numbers, case.unit, f"{case.ratio:.2f}", *verdict)
