"""What each stage logged in training, and the layout of its charts, which templates draw as inline SVG."""

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
LEFT, RIGHT, TOP, BOTTOM = 46, 50, 10, 38


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
        stage_title: What kind of stage that is; "" if the directory says it.
    """

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""
    stage_title: str = ""


def charts_of(run: Run) -> list[Chart]:
    """Return every chart for which the run logged at least two points, in the order of training."""
    charts: list[Chart] = []
    for stage in run.stages.values():
        for chart, x in _logged_charts(stage):
            lines = [Series(name, logged(stage, key, x), dots=x != "step") for name, key in chart.lines]
            drawn = tuple(line for line in lines if len(line.points) > 1)
            if not drawn:
                continue
            title = chart.title if x == "step" else f"{chart.title} against KL"
            label = "training steps" if x == "step" else "KL, nats per answer"
            charts.append(Chart(stage.name, title, label, drawn, chart.note, stage_info(stage).title))
    return charts


def _logged_charts(stage: StageResult) -> list[tuple[LoggedChart, str]]:
    """Return the charts of a stage, each with the key that its horizontal axis shows.

    The charts of a kind are in `pipeline.stages`; others depend on the run's rewards and experts.
    """
    info = stage_info(stage)
    keys = sorted({key for record in stage.history for key in record})
    charts = [(chart, "step") for chart in info.charts]
    if info.has_critic:
        rewards, taste = _reward_charts(keys)
        over_kl = (replace(rewards, note="The reward that PPO sees."), taste)
        charts = [(rewards, "step"), *charts, *((chart, "objective/kl") for chart in over_kl)]
    return [*charts, *((chart, "step") for chart in _expert_charts(keys))]


def _reward_charts(keys: Sequence[str]) -> tuple[LoggedChart, LoggedChart]:
    """Return the charts of PPO's rewards before weighting, and of the simulated annotators' hidden taste."""
    means = []
    for key in keys:
        match = re.fullmatch(r"rewards/(.+)/mean", key)
        if match:
            means.append((match[1], key))
    lines = tuple(line for line in means if "taste" not in line[0])
    if len(lines) > 1:
        rewards = LoggedChart("Rewards", lines)
    elif lines:
        # A single reward is the reward model's.
        rewards = LoggedChart("Reward-model score", (("score", lines[0][1]),))
    else:
        # If it has no key of its own, its score is the sum of all rewards.
        rewards = LoggedChart("Reward-model score", (("score", "reward"),))
    note = (
        "What the simulated annotators prefer; PPO does not see it. If it rises with the score, the policy is not "
        "gaming the reward model."
    )
    return rewards, LoggedChart("Hidden taste", tuple(line for line in means if "taste" in line[0]), note)


def _expert_charts(keys: Sequence[str]) -> list[LoggedChart]:
    """Return a chart of the experts' loads for each layer that has experts, and one of the routers' entropies."""
    experts = []
    for key in keys:
        # "router/layer_0/expert_3" is the load of the fourth expert in the first layer that has experts.
        match = re.fullmatch(r"router/layer_(\d+)/expert_(\d+)", key)
        if match:
            experts.append((int(match[1]), int(match[2])))
    charts = []
    entropies = []
    for layer, of_layer in groupby(sorted(experts), key=itemgetter(0)):
        loads = tuple((f"expert {expert + 1}", f"router/layer_{layer}/expert_{expert}") for _, expert in of_layer)
        note = "Tokens over the fair number; 1 is balanced."
        charts.append(LoggedChart(f"Load of the experts, layer {layer + 1}", loads, note))
        entropies.append((f"layer {layer + 1}", f"router/layer_{layer}/entropy"))
    return [*charts, LoggedChart("Entropy of the routers, nats", tuple(entropies))]


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts with one line per run: its validation line if it has one, otherwise its first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            # Five runs with two lines each would be indistinguishable.
            line = next((line for line in chart.series if line.name == "validation"), chart.series[0])
            base = merged.get((chart.stage, chart.title), replace(chart, series=()))
            merged[chart.stage, chart.title] = replace(base, series=(*base.series, replace(line, name=run.name)))
    return list(merged.values())


def logged(stage: StageResult, key: str, x: str = "step") -> Points:
    """Return the points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    points = [(finite(record.get(x)), finite(record.get(key))) for record in stage.history]
    return [(place, value) for place, value in points if place is not None and value is not None]


def last_logged(stage: StageResult, key: str) -> float | None:
    """Return the last finite value that the stage logged under `key`, None if there is none."""
    for record in reversed(stage.history):
        value = finite(record.get(key))
        if value is not None:
            return value
    return None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in [low, high], 1, 2 or 5 times a power of ten apart, at most `most` + 1 of them."""
    # The smallest round step that is at least as large as an even division.
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    indices = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{index * step:.12g}") for index in indices]


@dataclass(frozen=True)
class Axis:
    """An axis on which the value `low` lies at the coordinate `start`, and `high` at `end`."""

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
    return magnitude(value) if abs(value) >= 1000 else number(value, digits)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are too close to draw."""
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
        # Lines of more than 60 points are drawn faintly, under the means of at most 60 segments, which show the trend.
        size = math.ceil(len(line.points) / 60)
        segments = [line.points[start : start + size] for start in range(0, len(line.points), size)]
        means = [(fmean(x for x, _ in segment), fmean(y for _, y in segment)) for segment in segments]
        points = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
        course = [(x_axis.place(x), y_axis.place(y)) for x, y in means]
        drawing = {
            "css": f"s{index % 6}",
            "dots": line.dots,
            "points": points,
            "marked": course if len(course) <= 12 else course[-1:],
            "course": _svg_path(course),
            "raw": "",
        }
        if size > 1:
            drawing["raw"] = _svg_path(points)
        lines.append(drawing)
        if not line.dots:
            ends.append((course[-1][1], index, means[-1][1]))
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
    """Return labels for the ends of lines, at least a line of text apart.

    `ends` are the vertical coordinate, the index and the last value of each line.
    """
    labels = []
    apart = 12
    y = 0.0
    for place, (end, index, value) in enumerate(sorted(ends), start=1):
        # Each label is next to the end of its line, or lower if there is another one, but leaves room for those below.
        lowest = HEIGHT - BOTTOM - apart * (len(ends) - place)
        y = max(y + apart, min(end + 4, lowest))
        text = _short(value, max(0, 2 - math.floor(math.log10(abs(value) or 1.0))))
        labels.append({"css": f"s{index % 6}", "y": y, "label": text})
    return labels
