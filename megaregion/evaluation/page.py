"""Pages from templates: self-contained HTML in which everything from outside is escaped, and its charts.

Charts are inline SVG without script or font file, coloured by the page's style so that both themes fit.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from megaregion.files import write_text
from megaregion.schemas.run import Curve

ENCODERS = ("trained", "untrained", "pixels", "curation")
"""Encoders that the style gives a colour of their own; the others share one."""
WIDTH, HEIGHT = 560, 250
"""Of a chart of lines, in pixels."""
MOST_POINTS = 400
"""Points drawn of a curve; more would only blacken the page."""
HOVERS = 60
"""Places along a chart that name their value under the pointer."""


def render(template: str, **values: Any) -> Markup:
    """Fill a template of templates/, named without its ending .jinja, with all that it names."""
    return Markup(_templates.get_template(f"{template}.jinja").render(values))


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template and write it; readers see the old page or the new one."""
    write_text(path, render(template, **values))


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
class Line:
    """One curve of a chart; at least one point."""

    curve: Curve
    style: str
    """CSS class that colours it."""
    name: str = ""
    """Told at the line's end; a chart with one line needs none, and tells the values instead."""
    raw: Curve | None = None
    """Drawn faint behind the curve."""


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

    def __init__(self, lines: Sequence[Line]) -> None:
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

    def x(self, step: float) -> float:
        """Place of a step."""
        return self.left + (step - self._first) / (self._last - self._first) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Place of a value; an outlier lies just outside the frame."""
        share = (value - self.value_ticks[0]) / (self.value_ticks[-1] - self.value_ticks[0])
        return self.bottom - min(max(share, -0.02), 1.02) * (self.bottom - self.top)

    def points(self, curve: Curve) -> str:
        """A curve as the points of a polyline."""
        stride = max(1, math.ceil(len(curve.steps) / MOST_POINTS))
        chosen = sorted({*range(0, len(curve.steps), stride), len(curve.steps) - 1})
        return " ".join(f"{self.x(curve.steps[i]):.1f},{self.y(curve.values[i]):.1f}" for i in chosen)

    def hovers(self, curve: Curve) -> Iterator[tuple[float, float, int, float]]:
        """Stripes that tell a value under the pointer: left edge, width, step, value."""
        width = (self.right - self.left) / HOVERS
        for i in sorted({round(i * (len(curve.steps) - 1) / HOVERS) for i in range(HOVERS + 1)}):
            yield self.x(curve.steps[i]) - width / 2, width, curve.steps[i], curve.values[i]


def line_chart(lines: Sequence[Line], label: str, form: Callable[[float], str] = plain) -> Markup:
    """Draw a metric of one run, or of several that share the frame, over the steps.

    The label says what is shown to readers that see no picture; form is how a value is written.
    """
    return render("lines.svg", axes=Axes(lines), lines=lines, label=label, form=form, plain=plain)


def smoothed(curve: Curve) -> Curve:
    """The running mean over the last 5% of the values (at least one, at most 200) at each place."""
    window = min(200, max(1, len(curve.values) // 20))
    sums = list(accumulate(curve.values, initial=0.0))
    starts = [max(0, end - window) for end in range(1, len(sums))]
    means = ((sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1))
    return Curve(curve.steps, tuple(means))


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose a range; at least two."""
    if high <= low:
        low, high = low - abs(low) / 2 - 1e-9, low + abs(low) / 2 + 1e-9
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
