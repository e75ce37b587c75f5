"""Charts as inline SVG, in plain Python. Their colours come from the page's style sheet, through classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from markupsafe import Markup, escape

from pipeline.evaluation.intervals import Estimate
from pipeline.report.curves import Chart, Points, Series
from pipeline.report.stage_order import stage_info
from pipeline.report.text import magnitude, number, signed

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 50, 10, 38
MAX_POINTS = 60
"""A line with more points is drawn faintly, with the means of this many segments over it."""
MARKED_POINTS = 12
"""A line with at most this many points has a mark at each."""
LINE_HEIGHT = 12
"""Least distance between two values at the ends of lines."""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in [low, high], 1, 2 or 5 times a power of ten apart, at most `most` + 1 of them."""
    # The smallest round step that is at least as large as an even division.
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    """An axis from the value `low`, drawn at `start`, to the value `high`, drawn at `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return where a value is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the place and the label of each tick."""
        values = ticks(self.low, self.high)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        labels = [_short(value, digits) for value in values]
        return [(self.at(value), label) for value, label in zip(values, labels, strict=True)]


def _short(value: float, digits: int) -> str:
    """Return a value as the label of a tick or of a point."""
    return magnitude(value) if abs(value) >= 1000 else number(value, digits)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are too close to draw."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1e-12):
        return low, high
    pad = 0.1 * size if size > 1e-12 else 1.0
    return low - pad, high + pad


def line_chart(chart: Chart) -> Markup:
    """Draw the chart as an `<svg>` with a title and a description in words."""
    # The axis of steps and of the KL starts at 0.
    left, right = _range([0.0, *(x for line in chart.series for x, _ in line.points)])
    low, high = _range([y for line in chart.series for _, y in line.points])
    pad = (high - low) * 0.05
    # The axis of a quantity that is never negative starts at 0, unless that wastes half of the chart.
    bottom = 0.0 if 0 <= low < (high - low) else low - pad
    x_axis = _Axis(left, right, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(bottom, high + pad, HEIGHT - BOTTOM, TOP)

    # The grid with its labels, and the axis on which the lines stand.
    parts = []
    for y, label in y_axis.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - BOTTOM
    for x, label in x_axis.ticks():
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_label)}</text>')

    # What is drawn is also said in words, for readers who do not see it.
    words = f"Over {chart.x_label}."
    ends = []
    for index, line in enumerate(chart.series):
        course = _means(line.points)
        parts += _line(line, course, index, x_axis, y_axis)
        (x_first, first), (x_last, last) = line.points[0], line.points[-1]
        words += (
            f" {line.name}: {len(line.points)} points, from {first:.3g} at {x_first:.3g} to {last:.3g} at {x_last:.3g}."
        )
        if not line.dots:
            ends.append((y_axis.at(course[-1][1]), index, course[-1][1]))
    # The last values stand beside the ends of their lines, apart from each other.
    above = 0.0
    for place, (y, index, value) in enumerate(sorted(ends), start=1):
        lowest = base - LINE_HEIGHT * (len(ends) - place)
        above = max(above + LINE_HEIGHT, min(y + 4, lowest))
        label = _short(value, max(0, 2 - math.floor(math.log10(abs(value) or 1.0))))
        parts.append(f'<text class="end s{index % 6}" x="{WIDTH - 1}" y="{above:.1f}" text-anchor="end">{label}</text>')
    title = f"{stage_info(chart.stage).title}: {chart.title}"
    return _figure(WIDTH, HEIGHT, title, words, "".join(parts), "chart")


def _means(points: Points) -> Points:
    """Return the points or, of many, the means of `MAX_POINTS` segments."""
    size = math.ceil(len(points) / MAX_POINTS)
    segments = [points[start : start + size] for start in range(0, len(points), size)]
    return [(fmean(x for x, _ in segment), fmean(y for _, y in segment)) for segment in segments]


def _line(line: Series, course: Points, index: int, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Draw a line in the colour with this index, or its dots; a line many points are drawn faintly below the course."""
    css = f"s{index % 6}"
    drawn, means = ([(x_axis.at(x), y_axis.at(y)) for x, y in points] for points in (line.points, course))
    if line.dots:
        return [f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in drawn]
    # Training logs noise at every step, which would hide the course of the line.
    parts = [f'<path class="raw {css}" d="{_path(drawn)}"/>'] if len(drawn) > len(means) else []
    parts.append(f'<path class="line {css}" d="{_path(means)}"/>')
    marked = means if len(means) <= MARKED_POINTS else means[-1:]
    return parts + [f'<circle class="end {css}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in marked]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _figure(width: int, height: int, title: str, description: str, body: str, css: str) -> Markup:
    return Markup(
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}. '
        f'{escape(description)}"><title>{escape(title)}</title>{body}</svg>'
    )


def interval_bar(change: Estimate, title: str) -> Markup:
    """Draw the change of a share as a dot with its 95% interval, on an axis from -1 to 1 with 0 marked."""
    width, height = 160, 18
    low = change.value if change.low is None else change.low
    high = change.value if change.high is None else change.high
    x1, x, x2 = (width / 2 + max(-1.0, min(1.0, value)) * (width / 2 - 5) for value in (low, change.value, high))
    body = (
        f'<line class="grid" x1="5" x2="{width - 5}" y1="9" y2="9"/>'
        f'<line class="axis" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>'
        f'<line class="whisker" x1="{x1:.1f}" x2="{x2:.1f}" y1="9" y2="9"/>'
        f'<circle class="mean" cx="{x:.1f}" cy="9" r="4"/>'
    )
    words = f"{signed(change.value)}, from {signed(low)} to {signed(high)}"
    return _figure(width, height, title, words, body, "interval")


def share_bar(value: float, low: float | None, high: float | None) -> Markup:
    """Draw a share between 0 and 1 as a bar with its interval, to decorate the number next to it."""
    width, height = 80, 6
    filled, x1, x2 = (max(0.0, min(1.0, share or 0.0)) * width for share in (value, low, high))
    whisker = ""
    if low is not None and high is not None:
        whisker = f'<line class="whisker" x1="{x1:.1f}" x2="{x2:.1f}" y1="3" y2="3"/>'
    return Markup(
        f'<svg class="share" viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="{width}" height="{height}"/>'
        f'<rect class="fill" width="{filled:.1f}" height="{height}"/>{whisker}</svg>'
    )
