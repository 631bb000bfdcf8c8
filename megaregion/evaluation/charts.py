"""Charts as inline SVG: no script, no font file, coloured by the page's style so that both themes fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from megaregion.schemas.metrics import Curve

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 62, 14, 30
MOST_POINTS = 400
"""Points drawn of a raw curve; more would only blacken the page."""
HOVERS = 60
"""Places along a chart that name their value under the pointer."""

Format = Callable[[float], str]


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


def line_chart(curve: Curve, style: str, label: str, form: Format = plain, smooth: bool = True) -> str:
    """Draw a metric over the steps: the logged values faint, their running mean strong.

    Args:
        curve: The metric; at least one point.
        style: CSS class that colours the line.
        label: What the chart shows, for readers that see no picture.
        form: How a value is written.
        smooth: Whether to draw the running mean.
    """
    values = running_mean(curve.values) if smooth else curve.values
    ticks = nice_ticks(*_range(curve.values, values))
    x_low, x_high = curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return x, HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    end_x, end_y = place(curve.steps[-1], values[-1])
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *[_y_tick(place(x_low, tick)[1], form(tick)) for tick in ticks],
        *[
            _x_tick(place(step, 0)[0], plain(step))
            for step in nice_ticks(x_low, x_high)
            if x_low <= step <= x_high
        ],
        _path(curve.steps, curve.values, place, f"raw {style}") if smooth else "",
        _path(curve.steps, values, place, f"line {style}"),
        f'<circle class="end {style}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5"/>',
        f'<text class="end-label" x="{end_x + 8:.1f}" y="{end_y + 4:.1f}">{form(values[-1])}</text>',
        *_hovers(curve.steps, values, place, form),
        "</svg>",
    ]
    return "".join(parts)


def lines_chart(
    curves: Mapping[str, Curve],
    styles: Mapping[str, str],
    label: str,
    form: Format = plain,
    smooth: bool = True,
) -> str:
    """Draw one metric of several runs in one frame.

    Args:
        curves: The metric by run; at least one point each.
        styles: CSS class of each run, which colours its line.
        label: What the chart shows, for readers that see no picture.
        form: How a value is written.
        smooth: Draw the running mean instead of the values.
    """
    drawn = {
        name: Curve(own.steps, running_mean(own.values)) if smooth else own for name, own in curves.items()
    }
    ranges = [_range(own.values, own.values) for own in drawn.values()]
    ticks = nice_ticks(min(low for low, _ in ranges), max(high for _, high in ranges))
    x_low = min(own.steps[0] for own in drawn.values())
    x_high = max(x_low + 1, *(own.steps[-1] for own in drawn.values()))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return x, HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += [_y_tick(place(x_low, tick)[1], form(tick)) for tick in ticks]
    parts += [
        _x_tick(place(step, 0)[0], plain(step))
        for step in nice_ticks(x_low, x_high)
        if x_low <= step <= x_high
    ]
    for name, own in drawn.items():
        style, (x, y) = styles[name], place(own.steps[-1], own.values[-1])
        told = f"<title>{escape(name)}: {form(own.values[-1])} at step {own.steps[-1]:,}</title>"
        parts.append(_path(own.steps, own.values, place, f"line {style}"))
        parts.append(f'<circle class="end {style}" cx="{x:.1f}" cy="{y:.1f}" r="4">{told}</circle>')
    return "".join([*parts, "</svg>"])


def dot_chart(rows: Sequence[tuple[str, Mapping[str, float]]], label: str) -> str:
    """Draw one line per name with a dot per encoder on the scale 0..100%.

    Args:
        rows: Name, and a share in 0..1 of each encoder; the encoder's name is the dot's CSS class.
        label: What the chart shows, for readers that see no picture.
    """
    width, left, right, row_height, top = 1080, 210, 30, 27, 24
    height = top + row_height * len(rows) + 8

    def place(share: float) -> float:
        return left + share * (width - left - right)

    parts = [
        f'<svg class="chart dots" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height - 8}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="12" text-anchor="middle">{tick:.0%}</text>')
    for number, (name, shares) in enumerate(rows):
        y = top + row_height * (number + 0.5)
        low, high = place(min(shares.values())), place(max(shares.values()))
        parts.append(
            f'<text class="name" x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
        )
        parts.append(f'<line class="span" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        # The first encoder is the one of interest: drawn last, it lies on top.
        for encoder, share in reversed(list(shares.items())):
            parts.append(
                f'<circle class="dot {escape(encoder)}" cx="{place(share):.1f}" cy="{y}" r="5.5">'
                f"<title>{escape(name)}, {escape(encoder)}: {share:.0%}</title></circle>"
            )
    return "".join([*parts, "</svg>"])


def running_mean(values: Sequence[float]) -> tuple[float, ...]:
    """Mean over the last 5% of the values (at least one, at most 200) at each place."""
    window = min(200, max(1, len(values) // 20))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return tuple(
        (sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(values) + 1)
    )


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, that enclose a range; at least two."""
    if high <= low:
        low, high = low - abs(low) / 2 - 1e-9, low + abs(low) / 2 + 1e-9
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _range(raw: Sequence[float], smooth: Sequence[float]) -> tuple[float, float]:
    """Range of the axis: all of the smooth curve, and the raw one but for its 1% of outliers."""
    ordered = sorted(raw)
    cut = len(ordered) // 100
    return min(*smooth, ordered[cut]), max(*smooth, ordered[-1 - cut])


def _path(
    steps: Sequence[int],
    values: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    style: str,
) -> str:
    stride = max(1, math.ceil(len(steps) / MOST_POINTS))
    chosen = sorted({*range(0, len(steps), stride), len(steps) - 1})
    points = " ".join("{:.1f},{:.1f}".format(*place(steps[i], values[i])) for i in chosen)
    return f'<polyline class="{style}" points="{points}"/>'


def _hovers(
    steps: Sequence[int],
    values: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    form: Format,
) -> list[str]:
    width = (WIDTH - LEFT - RIGHT) / HOVERS
    chosen = sorted({round(i * (len(steps) - 1) / HOVERS) for i in range(HOVERS + 1)})
    return [
        f'<rect class="hover" x="{place(steps[i], 0)[0] - width / 2:.1f}" y="{TOP}" width="{width:.1f}" '
        f'height="{HEIGHT - TOP - BOTTOM}"><title>step {steps[i]:,}: {form(values[i])}</title></rect>'
        for i in chosen
    ]


def _y_tick(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _x_tick(x: float, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>'
