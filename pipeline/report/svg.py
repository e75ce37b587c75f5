"""Charts as inline SVG, in plain Python. Their colours come from the page's style sheet, through classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from pipeline.evaluation.intervals import Estimate
from pipeline.report.curves import Chart, Points, Series
from pipeline.report.labels import stage_info
from pipeline.report.text import magnitude, number, signed

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 38
MAX_POINTS = 60
"""A line with more points is drawn faintly, with the means of this many segments over it."""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in [low, high], 1, 2 or 5 times a power of ten apart, at most `most` + 1 of them."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _label(value: float, step: float) -> str:
    if abs(value) >= 1000:
        return magnitude(value)
    return number(value, max(0, -math.floor(math.log10(step) + 1e-9)))


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are too close to draw."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1e-12):
        return low, high
    pad = 0.1 * size if size > 1e-12 else 1.0
    return low - pad, high + pad


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = _span(values)
    pad = (high - low) * 0.05
    # The axis of a quantity that is never negative starts at 0, unless that wastes half of the chart.
    return (0.0 if 0 <= low < (high - low) else low - pad), high + pad


def _means(points: Points) -> Points:
    """Average `points` over at most `MAX_POINTS` segments of equally many points."""
    size = math.ceil(len(points) / MAX_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


class _Axes:
    """Map values to the units of the drawing."""

    def __init__(self, series: Sequence[Series]) -> None:
        self.x_low, self.x_high = _span([x for line in series for x, _ in line.points])
        self.y_low, self.y_high = _bounds([y for line in series for _, y in line.points])

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def line_chart(chart: Chart) -> Markup:
    """Draw the chart as an `<svg>` with a title and a description in words."""
    axes = _Axes(chart.series)
    lines = [_line(axes, line, index) for index, line in enumerate(chart.series)]
    title = f"{stage_info(chart.stage).title}: {chart.title}"
    return _figure(WIDTH, HEIGHT, title, _in_words(chart), "".join([_grid(axes, chart.x_label), *lines]), "chart")


def _grid(axes: _Axes, x_label: str) -> str:
    parts = []
    y_ticks = ticks(axes.y_low, axes.y_high)
    y_step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 1.0
    for value in y_ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(value, y_step)}</text>')
    x_ticks = ticks(axes.x_low, axes.x_high)
    x_step = x_ticks[1] - x_ticks[0] if len(x_ticks) > 1 else 1.0
    base = HEIGHT - BOTTOM
    for value in x_ticks:
        x = axes.x(value)
        anchor = "end" if x > WIDTH - RIGHT - 8 else "middle"
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{_label(value, x_step)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _line(axes: _Axes, line: Series, index: int) -> str:
    css = f"s{index % 6}"
    if line.dots:
        return "".join(
            f'<circle class="dot {css}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.4"/>' for x, y in line.points
        )
    parts = []
    points = line.points
    if len(points) > MAX_POINTS:
        parts.append(f'<path class="raw {css}" d="{axes.path(points)}"/>')
        points = _means(points)
    parts.append(f'<path class="line {css}" d="{axes.path(points)}"/>')
    x, y = points[-1]
    parts.append(f'<circle class="end {css}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="2.6"/>')
    return "".join(parts)


def _in_words(chart: Chart) -> str:
    sentences = []
    for line in chart.series:
        (x_first, first), (x_last, last) = line.points[0], line.points[-1]
        ends = f"from {first:.3g} at {x_first:.3g} to {last:.3g} at {x_last:.3g}"
        sentences.append(f"{line.name}: {len(line.points)} points, {ends}.")
    return f"Over {chart.x_label}. " + " ".join(sentences)


def _figure(width: int, height: int, title: str, description: str, body: str, css: str) -> Markup:
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. '
        f'{escape(description)}"><title>{escape(title)}</title>{body}</svg>'
    )


def interval_bar(change: Estimate, reach: float, verdict: str, title: str) -> Markup:
    """Draw a dot and its 95% interval on an axis from -`reach` to `reach`, with 0 marked, coloured by `verdict`."""
    width, height = 160, 18

    def place(value: float) -> float:
        return width / 2 + max(-1.0, min(1.0, value / reach)) * (width / 2 - 5)

    low = change.value if change.low is None else change.low
    high = change.value if change.high is None else change.high
    body = (
        f'<line class="axis" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>'
        f'<line class="whisker" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="9" y2="9"/>'
        f'<circle class="mean" cx="{place(change.value):.1f}" cy="9" r="4"/>'
    )
    words = f"{signed(change.value)}, from {signed(low)} to {signed(high)}"
    return _figure(width, height, title, words, body, f"interval {verdict}")


def share_bar(value: float, low: float | None, high: float | None) -> Markup:
    """Draw a share between 0 and 1 as a bar with its interval, to decorate the number beside it."""
    width, height = 80, 6

    def place(share: float) -> float:
        return max(0.0, min(1.0, share)) * width

    whisker = ""
    if low is not None and high is not None:
        whisker = f'<line class="whisker" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="3" y2="3"/>'
    return Markup(
        f'<svg class="share" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="{width}" height="{height}"/>'
        f'<rect class="fill" width="{place(value):.1f}" height="{height}"/>{whisker}</svg>'
    )
