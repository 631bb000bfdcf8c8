"""Pages from templates: self-contained HTML in which everything from outside is escaped, and its charts.

Charts are inline SVG without script or font file, coloured by the page's style so that both themes fit.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from megaregion.files import write_text
from megaregion.schemas.run import HUGE

ENCODERS = ("trained", "untrained", "pixels", "curation")
"""Encoders that the style gives a colour of their own; the others share one."""
WIDTH, HEIGHT = 560, 250
"""Of a chart of lines, in pixels."""
COLUMNS = 446
"""Columns of pixels between a chart's axes; of each the least and the greatest value are drawn."""
Numbers = NDArray[np.floating[Any]]
HOVERS = 60
"""Places along a chart that name their value under the pointer."""


def render(template: str, **values: Any) -> Markup:
    """Fill a template of templates/, named without its ending .jinja, with all that it names."""
    return Markup(_templates.get_template(f"{template}.jinja").render(values))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template and write it; readers see the old page or the new one."""
    write_text(path, render(template, **values))


def duration(seconds: float) -> str:
    """As 12 s, 5 min, 3 h 20 min or 4 d 6 h."""
    seconds = round(max(0.0, seconds))
    minutes, hours = round(seconds / 60), seconds // 3600
    if seconds < 90:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{hours} h {seconds % 3600 // 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def clock_time(seconds: float) -> str:
    """As 11-29 22:51:07, in universal time."""
    return f"{datetime.fromtimestamp(seconds, UTC):%m-%d %H:%M:%S}"


def data_uri(image: Image.Image, longest: int) -> str:
    """The image inside a URI, shrunk to this longest side: a JPEG, or a PNG if it has transparency."""
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    kind, options = ("png", {}) if image.mode == "RGBA" else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    small.save(buffer, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_templates = Environment(
    loader=PackageLoader("megaregion.evaluation"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "clock": clock_time,
    # About how wide a name is in a bold sans-serif, in letters' heights; the page has no font to measure.
    "ems": lambda name: sum(0.74 if sign.isupper() or sign in "mw" else 0.61 for sign in name),
    "percent": lambda share, digits=1: f"{share:.{digits}%}",
    "px": "{:.1f}".format,
    "style": lambda encoder: encoder if encoder in ENCODERS else "other",
    "thousands": "{:,}".format,
    "uri": data_uri,
}


# ---- charts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One metric over the steps at which it was logged."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


class History:
    """Numbers by step, a column each: where a run took steps again, the later attempt alone is kept."""

    def __init__(self) -> None:
        self.steps: NDArray[np.int64] = np.empty(0, np.int64)
        """Rising."""
        self.columns: dict[str, Numbers] = {}
        """NaN where a step has no such number; the time alone needs 8 bytes."""
        self.not_finite: Counter[str] = Counter()
        """Numbers by name that were NaN or infinite; columns leave them out."""

    def add(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Add records in their order; gives the number of those that name no step."""
        taken = [r for r in records if type(r.get("step")) is int and 0 <= r["step"] < 2**50]
        if not taken:
            return len(records)
        steps = np.array([record["step"] for record in taken], np.int64)
        later = np.minimum.accumulate(steps[::-1])[::-1]
        stay = np.append(steps[:-1] < later[1:], True)
        cut = int(np.searchsorted(self.steps, later[0]))
        self.steps = np.append(self.steps[:cut], steps[stay])
        for name in dict.fromkeys(chain(self.columns, chain.from_iterable(taken))):
            given = [record.get(name) for record in taken]
            if not set(map(type, given)) <= {float, NoneType}:
                given = [v if type(v) is float or (type(v) is int and abs(v) < HUGE) else None for v in given]
            if (missing := given.count(None)) == len(given) and name not in self.columns:
                continue
            kind = np.float64 if name == "time" else np.float32
            with np.errstate(over="ignore"):
                values = np.array(given, np.float64).astype(kind)
            finite = np.isfinite(values)
            self.not_finite[name] += int((~finite).sum()) - missing
            values[~finite] = np.nan
            old = self.columns.get(name, np.full(cut, np.nan, kind))[:cut]
            self.columns[name] = np.append(old, values[stay])
        return len(records) - len(taken)

    def curve(self, name: str) -> tuple[NDArray[np.int64], Numbers]:
        """The steps that have a number of this name, and the numbers."""
        values = self.columns.get(name, np.full(len(self.steps), np.nan))
        there = np.isfinite(values)
        return self.steps[there], values[there]


@dataclass(frozen=True)
class Line:
    """One curve of a chart; at least one point."""

    curve: Curve
    style: str
    """CSS class that colours it."""
    name: str = ""
    """Told at the line's end; a chart with one line needs none, and tells the values instead."""
    raw: Curve | None = None
    """Drawn faint behind the curve."""
    area: bool = False
    """Whether it is filled down to the axis."""


@dataclass(frozen=True)
class Mark:
    """A step at which something happened: a line across the chart."""

    step: int
    style: str
    told: str


def plain(value: float) -> str:
    """A number with three significant digits, small ones like 1.5e-3."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.02:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


class Axes:
    """Where steps and values lie in a chart, in pixels from its upper left corner."""

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = 52, WIDTH - 62, 14, HEIGHT - 30

    def __init__(self, lines: Sequence[Line], marks: Sequence[Mark] = ()) -> None:
        self._first = min(line.curve.steps[0] for line in lines)
        self._last = max(self._first + 1, *(line.curve.steps[-1] for line in lines))
        # All of a curve is shown, and of a raw one all but its 1% of outliers.
        shown = [value for line in lines for value in line.curve.values]
        for ordered in (sorted(line.raw.values) for line in lines if line.raw):
            outliers = len(ordered) // 100
            shown += [ordered[outliers], ordered[-1 - outliers]]
        self.value_ticks = nice_ticks(min(shown), max(shown))
        ticks = nice_ticks(self._first, self._last)
        self.step_ticks = [step for step in ticks if self._first <= step <= self._last]
        self.marks = [mark for mark in marks if self._first <= mark.step <= self._last]

    def x(self, step: float) -> float:
        """Place of a step."""
        return self.left + (step - self._first) / (self._last - self._first) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Place of a value; an outlier lies just outside the frame."""
        share = (value - self.value_ticks[0]) / (self.value_ticks[-1] - self.value_ticks[0])
        return self.bottom - min(max(share, -0.02), 1.02) * (self.bottom - self.top)

    def points(self, curve: Curve) -> str:
        """A curve as the points of a polyline."""
        drawn = thinned(np.asarray(curve.steps), np.asarray(curve.values))
        return " ".join(
            f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(drawn.steps, drawn.values, strict=True)
        )

    def hovers(self, curve: Curve) -> Iterator[tuple[float, float, int, float]]:
        """Stripes that tell a value under the pointer: left edge, width, step, value."""
        width = (self.right - self.left) / HOVERS
        for i in sorted({round(i * (len(curve.steps) - 1) / HOVERS) for i in range(HOVERS + 1)}):
            yield self.x(curve.steps[i]) - width / 2, width, curve.steps[i], curve.values[i]


def line_chart(
    lines: Sequence[Line], label: str, form: Callable[[float], str] = plain, marks: Sequence[Mark] = ()
) -> Markup:
    """Draw a metric of one run, or of several that share the frame, over the steps.

    The label says what is shown to readers that see no picture; form is how a value is written.
    """
    return render("lines.svg", axes=Axes(lines, marks), lines=lines, label=label, form=form, plain=plain)


def running_mean(values: NDArray[Any]) -> NDArray[np.float64]:
    """At each place the mean over the last 5% of the values: at least one, at most 200 or 0.5%."""
    window = min(max(200, len(values) // 200), max(1, len(values) // 20))
    sums = np.append(0.0, np.cumsum(values, dtype=np.float64))
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - window)
    means: NDArray[np.float64] = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def column_starts(steps: NDArray[Any]) -> NDArray[np.int64]:
    """The first place of each column of pixels, for rising steps."""
    column = (steps - steps[0]) * COLUMNS // (steps[-1] - steps[0] + 1)
    return np.flatnonzero(np.diff(column, prepend=-1))


def thinned(steps: NDArray[Any], values: NDArray[Any]) -> Curve:
    """A curve that looks the same: its ends, and the least and greatest value of each column of pixels."""
    if len(steps) > 2 * COLUMNS:
        starts = column_starts(steps)
        counts = np.diff(np.append(starts, len(steps)))
        places = [starts[:1], np.array([len(steps) - 1])]
        for extreme in (np.minimum, np.maximum):
            hits = np.flatnonzero(values == np.repeat(extreme.reduceat(values, starts), counts))
            places.append(hits[np.searchsorted(hits, starts)])
        chosen = np.unique(np.concatenate(places))
        steps, values = steps[chosen], values[chosen]
    return Curve(tuple(steps.tolist()), tuple(values.tolist()))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose a range; at least two."""
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
