"""The charts of a report: what each stage logged in training, laid out for a template that draws inline SVG.

A chart passes through three forms:

    LoggedChart    which keys of the training log to draw (`pipeline.stages.kinds`, or found in the log)
    Chart          the points that were logged under these keys (`charts_of`, or `overlay` for several runs)
    layout(chart)  coordinates of lines, ticks and labels, which chart.html.jinja draws
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from statistics import fmean
from typing import Any

from markupsafe import Markup

from pipeline.evaluation.intervals import finite
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run, stage_info
from pipeline.report.text import magnitude, number
from pipeline.stages.kinds import LoggedChart

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 360, 210
"""Size of a chart, in the units of its SVG."""
LEFT, RIGHT, TOP, BOTTOM = 46, 50, 10, 38
"""Margins around the lines: room for ticks on the left, last values on the right and the horizontal axis."""
MAX_SEGMENTS = 60
"""A line with more points is drawn faintly, under the means of this many segments, which show the trend."""
LABEL_HEIGHT = 12
"""Height of a line of text, in the units of the SVG."""


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points (x, y), drawn as dots without a line if `dots`."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of a stage.

    Attributes:
        stage: Directory of the stage.
        title: What it shows.
        x_label: What its horizontal axis shows.
        series: Its lines, at least one.
        note: How to read it, "" if that is clear.
        stage_title: Name of the stage's kind in titles; if it is "", `stage` determines it.
    """

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""
    stage_title: str = ""


def charts_of(run: Run) -> list[Chart]:
    """Return the charts of all stages, in the order of training.

    Lines of fewer than two points are omitted, and so are charts without lines.
    """
    charts: list[Chart] = []
    for stage in run.stages.values():
        for chart, x_key in _logged_charts(stage):
            is_over_steps = x_key == "step"
            series = []
            for name, key in chart.lines:
                points = logged(stage, key, x_key)
                if len(points) > 1:
                    series.append(Series(name, points, dots=not is_over_steps))
            if not series:
                continue
            title = chart.title if is_over_steps else f"{chart.title} against KL"
            x_label = "training steps" if is_over_steps else "KL, nats per answer"
            charts.append(Chart(stage.name, title, x_label, tuple(series), chart.note, stage_info(stage).title))
    return charts


def _logged_charts(stage: StageResult) -> list[tuple[LoggedChart, str]]:
    """Return the charts of a stage, each with the logged key of its horizontal axis ("step" or "objective/kl").

    The charts that every stage of a kind has are in `pipeline.stages`. The others depend on what the stage logged:
    its rewards, if it is trained by PPO, and its experts, if the model has any.
    """
    info = stage_info(stage)
    keys = sorted({key for record in stage.history for key in record})
    charts = [(chart, "step") for chart in info.charts]
    if info.has_critic:
        rewards, taste = _reward_charts(keys)
        charts.insert(0, (rewards, "step"))
        # Drawn over the KL from the reference, the same rewards show what each nat of drift gained.
        charts.append((replace(rewards, note="The reward that PPO sees."), "objective/kl"))
        charts.append((taste, "objective/kl"))
    for chart in _expert_charts(keys):
        charts.append((chart, "step"))
    return charts


def _reward_charts(keys: Sequence[str]) -> tuple[LoggedChart, LoggedChart]:
    """Return the charts of PPO's rewards before weighting, and of the simulated annotators' hidden taste.

    `keys` are all keys of the training log. The second chart has no lines if no reward is called a taste.
    """
    rewards_lines: list[tuple[str, str]] = []
    taste_lines: list[tuple[str, str]] = []
    for key in keys:
        match = re.fullmatch(r"rewards/(.+)/mean", key)
        if match:
            name = match[1]
            lines = taste_lines if "taste" in name else rewards_lines
            lines.append((name, key))
    if len(rewards_lines) > 1:
        rewards = LoggedChart("Rewards", tuple(rewards_lines))
    elif rewards_lines:
        # A single reward is the reward model's.
        rewards = LoggedChart("Reward-model score", (("score", rewards_lines[0][1]),))
    else:
        # Without any key `rewards/…/mean`, the reward model's score is the total reward.
        rewards = LoggedChart("Reward-model score", (("score", "reward"),))
    note = (
        "What the simulated annotators prefer; PPO does not see it. If it rises with the score, the policy is not "
        "gaming the reward model."
    )
    return rewards, LoggedChart("Hidden taste", tuple(taste_lines), note)


def _expert_charts(keys: Sequence[str]) -> list[LoggedChart]:
    """Return a chart of the experts' loads for each layer that has experts, and one of the routers' entropies.

    The latter has no lines if the model has no experts.
    """
    experts = []
    for key in keys:
        # "router/layer_0/expert_3" is the load of the fourth expert in the first layer that has experts.
        match = re.fullmatch(r"router/layer_(\d+)/expert_(\d+)", key)
        if match:
            experts.append((int(match[1]), int(match[2])))
    charts = []
    entropies = []
    for layer, group in groupby(sorted(experts), key=itemgetter(0)):
        loads = tuple((f"expert {expert + 1}", f"router/layer_{layer}/expert_{expert}") for _, expert in group)
        note = "Tokens over the fair number; 1 is balanced."
        charts.append(LoggedChart(f"Load of the experts, layer {layer + 1}", loads, note))
        entropies.append((f"layer {layer + 1}", f"router/layer_{layer}/entropy"))
    return [*charts, LoggedChart("Entropy of the routers, nats", tuple(entropies))]


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of several runs with one line per run, which is named after the run.

    This is the validation line of the run's chart if it has one, otherwise its first line: five runs with two lines
    each would be indistinguishable.
    """
    # Charts of two runs are the same chart if stage and title are equal.
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            line = next((line for line in chart.series if line.name == "validation"), chart.series[0])
            line = replace(line, name=run.name)
            key = (chart.stage, chart.title)
            if key in merged:
                merged[key] = replace(merged[key], series=(*merged[key].series, line))
            else:
                merged[key] = replace(chart, series=(line,))
    return list(merged.values())


def logged(stage: StageResult, key: str, x: str = "step") -> Points:
    """Return the points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    points = []
    for record in stage.history:
        place = finite(record.get(x))
        value = finite(record.get(key))
        if place is not None and value is not None:
            points.append((place, value))
    return points


def last_logged(stage: StageResult, key: str) -> float | None:
    """Return the last finite value that the stage logged under `key`, None if there is none."""
    for record in reversed(stage.history):
        value = finite(record.get(key))
        if value is not None:
            return value
    return None


def ticks(low: float, high: float, intervals: int = 5) -> list[float]:
    """Return round numbers in [low, high], 1, 2 or 5 times a power of ten apart, with at most `intervals` between them.

    For example, `ticks(0, 7)` is [0, 2, 4, 6].
    """
    # The step is the smallest round number that is at least an even division. 1e-9 allows for rounding errors.
    even_step = (high - low) / intervals
    power = 10.0 ** math.floor(math.log10(even_step))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= even_step * (1 - 1e-9))
    indices = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{index * step:.12g}") for index in indices]


@dataclass(frozen=True)
class Axis:
    """An axis which maps the values [low, high] to the SVG coordinates [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return the coordinate and the label of each tick."""
        values = ticks(self.low, self.high)
        step = values[1] - values[0] if len(values) > 1 else 1.0
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(self.place(value), _short(value, digits)) for value in values]


def _short(value: float, digits: int) -> str:
    """Format a value for an axis: "0.25" with as many digits as requested, and "12 k" from 1,000 on."""
    return magnitude(value) if abs(value) >= 1000 else number(value, digits)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved 10% apart if they are (nearly) equal, which cannot be drawn."""
    low = min(values)
    high = max(values)
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1e-12):
        return low, high
    pad = 0.1 * size if size > 1e-12 else 1.0
    return low - pad, high + pad


def layout(chart: Chart) -> dict[str, Any]:
    """Return the layout for chart.html.jinja, and the series themselves, for readers who cannot see the drawing."""
    x_axis, y_axis = _axes(chart)
    lines = []
    # The vertical coordinate at which each line ends, its index, and the value there.
    ends = []
    for index, line in enumerate(chart.series):
        means = _segment_means(line.points)
        points = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
        trend = [(x_axis.place(x), y_axis.place(y)) for x, y in means]
        drawing = {
            "css": _css_class(index),
            "dots": line.dots,
            "points": points,
            # If there are few points, each gets a mark, otherwise only the last one.
            "marked": trend if len(trend) <= 12 else trend[-1:],
            "course": _svg_path(trend),
            "raw": "",
        }
        if len(means) < len(points):
            drawing["raw"] = _svg_path(points)
        lines.append(drawing)
        if not line.dots:
            ends.append((trend[-1][1], index, means[-1][1]))
    return {
        "title": f"{chart.stage_title or stage_info(chart.stage).title}: {chart.title}",
        "series": chart.series,
        "lines": lines,
        "values": _last_values(ends),
        "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "base": HEIGHT - BOTTOM},
        "x_label": chart.x_label,
        "x_ticks": x_axis.ticks(),
        "y_ticks": y_axis.ticks(),
    }


def _css_class(index: int) -> str:
    """Return the class of the line `index` of a chart; the style sheet has six colours."""
    return f"s{index % 6}"


def _segment_means(points: Points) -> Points:
    """Return the mean point of each of at most `MAX_SEGMENTS` segments; up to so many points are returned as they are.

    The segments have the same number of points, except for the last one, which may be shorter.
    """
    size = math.ceil(len(points) / MAX_SEGMENTS)
    means = []
    for start in range(0, len(points), size):
        segment = points[start : start + size]
        means.append((fmean(x for x, _ in segment), fmean(y for _, y in segment)))
    return means


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    """Return the horizontal and the vertical axis of a chart."""
    first, last = _range([0.0, *(x for line in chart.series for x, _ in line.points)])
    low, high = _range([y for line in chart.series for _, y in line.points])
    pad = (high - low) * 0.05
    # The axis of a quantity that is never negative starts at 0, unless that wastes half of the chart.
    bottom = 0.0 if 0 <= low < (high - low) else low - pad
    return Axis(first, last, LEFT, WIDTH - RIGHT), Axis(bottom, high + pad, HEIGHT - BOTTOM, TOP)


def _svg_path(points: Points) -> Markup:
    """Return the `d` attribute of an SVG path through coordinates."""
    return Markup("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points))


def _last_values(ends: Sequence[tuple[float, int, float]]) -> list[dict[str, Any]]:
    """Return the labels with the last values of the lines, from top to bottom, so far apart that none overlap.

    `ends` are the vertical coordinate of the end, the index and the last value of each line.
    """
    labels = []
    y = 0.0
    for count, (end, index, value) in enumerate(sorted(ends), start=1):
        # A label is next to the end of its line (4 units lower, which centres the text) unless the label above it is
        # in the way. It leaves room for the labels that are still to be placed below it.
        lowest = HEIGHT - BOTTOM - LABEL_HEIGHT * (len(ends) - count)
        y = max(y + LABEL_HEIGHT, min(end + 4, lowest))
        # Three significant digits.
        digits = max(0, 2 - math.floor(math.log10(abs(value) or 1.0)))
        labels.append({"css": _css_class(index), "y": y, "label": _short(value, digits)})
    return labels
