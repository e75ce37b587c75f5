"""What each stage logged in training, and the layout of its charts, which templates draw as inline SVG."""

import math
import re
from collections.abc import Callable, Sequence
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
    """A chart of the stage in the directory `stage`, with at least one line and perhaps a note on how to read it.

    `stage_title` says what kind of stage that is.
    """

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""
    stage_title: str = ""


def charts_of(run: Run) -> list[Chart]:
    """Return every chart for which the run logged at least two points, in the order of training."""
    found: list[Chart] = []
    for stage in run.stages.values():
        for chart, x in _logged_charts(stage):
            lines = [Series(name, logged(stage, key, x), dots=x != "step") for name, key in chart.lines]
            if drawn := tuple(line for line in lines if len(line.points) > 1):
                title = chart.title if x == "step" else f"{chart.title} against KL"
                label = "training steps" if x == "step" else "KL, nats per answer"
                found.append(Chart(stage.name, title, label, drawn, chart.note, stage_info(stage).title))
    return found


def _logged_charts(stage: StageResult) -> list[tuple[LoggedChart, str]]:
    """Return the charts of a stage, each with the key that its horizontal axis shows."""
    # The charts of a kind are in `pipeline.stages`; others depend on the run's rewards and experts.
    info = stage_info(stage)
    charts = [(chart, "step") for chart in info.charts]
    keys = sorted({key for record in stage.history for key in record})
    if info.has_critic:
        # The means of PPO's rewards before weighting, and of the annotators' hidden taste.
        means = [(match[1], key) for key in keys if (match := re.fullmatch(r"rewards/(.+)/mean", key))]
        rewards = LoggedChart("Rewards", tuple(line for line in means if "taste" not in line[0]))
        # A single reward is the reward model's. If it has no key of its own, its score is the sum of all rewards.
        if len(rewards.lines) < 2:
            score = rewards.lines[0][1] if rewards.lines else "reward"
            rewards = LoggedChart("Reward-model score", (("score", score),))
        hidden = "What the simulated annotators prefer; PPO does not see it. If it rises with the score, the policy is "
        hidden += "not gaming the reward model."
        taste = LoggedChart("Hidden taste", tuple(line for line in means if "taste" in line[0]), hidden)
        over_kl = [replace(rewards, note="The reward that PPO sees."), taste]
        charts = [(rewards, "step"), *charts, *((chart, "objective/kl") for chart in over_kl)]
    # "router/layer_0/expert_3" is the load of the fourth expert in the first layer that has experts.
    pattern = re.compile(r"router/layer_(\d+)/expert_(\d+)")
    experts = sorted((int(match[1]), int(match[2])) for key in keys if (match := pattern.fullmatch(key)))
    entropies = []
    for layer, its_experts in groupby(experts, key=itemgetter(0)):
        loads = tuple((f"expert {expert + 1}", f"router/layer_{layer}/expert_{expert}") for _, expert in its_experts)
        note = "Tokens over the fair number; 1 is balanced."
        charts.append((LoggedChart(f"Load of the experts, layer {layer + 1}", loads, note), "step"))
        entropies.append((f"layer {layer + 1}", f"router/layer_{layer}/entropy"))
    return [*charts, (LoggedChart("Entropy of the routers, nats", tuple(entropies)), "step")]


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts with one line per run: its validation line if it has one, otherwise its first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            # Five runs with two lines each would be indistinguishable.
            chosen = next((line for line in chart.series if line.name == "validation"), chart.series[0])
            base = merged.get((chart.stage, chart.title), replace(chart, series=()))
            merged[chart.stage, chart.title] = replace(base, series=(*base.series, replace(chosen, name=run.name)))
    return list(merged.values())


def logged(stage: StageResult, key: str, x: str = "step") -> Points:
    """Return the points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    points = [(finite(record.get(x)), finite(record.get(key))) for record in stage.history]
    return [(at, value) for at, value in points if at is not None and value is not None]


def last_logged(stage: StageResult, key: str) -> float | None:
    """Return the last finite value that the stage logged under `key`, None if there is none."""
    return next((v for record in reversed(stage.history) if (v := finite(record.get(key))) is not None), None)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers in [low, high], 1, 2 or 5 times a power of ten apart, at most `most` + 1 of them."""
    # The smallest round step that is at least as large as an even division.
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    indices = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{index * step:.12g}") for index in indices]


Axis = tuple[Callable[[float], float], list[tuple[float, str]]]
"""A function that places a value on an axis, and the position and label of each tick."""


def _axis(low: float, high: float, start: float, end: float) -> Axis:
    """Return the axis on which `low` lies at `start` and `high` at `end`."""

    def at(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    values = ticks(low, high)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return at, [(at(value), _short(value, digits)) for value in values]


def _short(value: float, digits: int) -> str:
    return magnitude(value) if abs(value) >= 1000 else number(value, digits)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest value, moved apart if they are too close to draw."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1e-12):
        return low, high
    pad = 0.1 * size if size > 1e-12 else 1.0
    return low - pad, high + pad


def layout(chart: Chart) -> dict[str, Any]:
    """Return the layout for chart.html.jinja, and the series themselves, for readers who cannot see the drawing."""
    left, right = _range([0.0, *(x for line in chart.series for x, _ in line.points)])
    x_at, x_ticks = _axis(left, right, LEFT, WIDTH - RIGHT)
    low, high = _range([y for line in chart.series for _, y in line.points])
    pad = (high - low) * 0.05
    # The axis of a quantity that is never negative starts at 0, unless that wastes half of the chart.
    bottom = 0.0 if 0 <= low < (high - low) else low - pad
    y_at, y_ticks = _axis(bottom, high + pad, HEIGHT - BOTTOM, TOP)
    lines = []
    ends = []
    for index, line in enumerate(chart.series):
        # Lines of more than 60 points are drawn faintly, under the means of at most 60 segments, which show the trend.
        size = math.ceil(len(line.points) / 60)
        segments = [line.points[start : start + size] for start in range(0, len(line.points), size)]
        course = [(fmean(x for x, _ in segment), fmean(y for _, y in segment)) for segment in segments]
        drawn, means = ([(x_at(x), y_at(y)) for x, y in points] for points in (line.points, course))
        css = f"s{index % 6}"
        raw, drawn_course = (Markup("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)) for points in (drawn, means))
        shown = {"css": css, "dots": line.dots, "points": drawn, "marked": means if len(means) <= 12 else means[-1:]}
        lines.append(shown | {"course": drawn_course, "raw": raw if size > 1 else ""})
        if not line.dots:
            ends.append((means[-1][1], index, course[-1][1]))
    # The last values are shown next to the ends of their lines, at least a line of text apart.
    values = []
    above, apart = 0.0, 12
    for place, (y, index, value) in enumerate(sorted(ends), start=1):
        above = max(above + apart, min(y + 4, HEIGHT - BOTTOM - apart * (len(ends) - place)))
        label = _short(value, max(0, 2 - math.floor(math.log10(abs(value) or 1.0))))
        values.append({"css": f"s{index % 6}", "y": above, "label": label})
    title = f"{chart.stage_title or stage_info(chart.stage).title}: {chart.title}"
    axes = {"x_label": chart.x_label, "x_ticks": x_ticks, "y_ticks": y_ticks}
    frame = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "base": HEIGHT - BOTTOM}
    return {"title": title, "series": chart.series, "lines": lines, "values": values, "size": frame, **axes}
