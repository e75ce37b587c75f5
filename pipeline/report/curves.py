"""What each stage logged in training, and the curves of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from pipeline.evaluation.intervals import finite
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run
from pipeline.report.stage_order import stage_info
from pipeline.stages.kinds import LoggedChart

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points (x, y), drawn as dots without a line if `dots`."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart of the stage in the directory `stage`, with at least one line and perhaps a note on how to read it."""

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""


def charts_of(run: Run) -> list[Chart]:
    """Return every chart for which the run logged at least two points, in the order of training."""
    found: list[Chart] = []
    for stage in run.stages.values():
        # The charts of a kind stand in `pipeline.stages`; the others depend on the run's rewards and experts.
        info = stage_info(stage.name)
        charts = [(chart, "step") for chart in info.charts]
        if info.has_critic:
            rewards, taste = _reward_charts(stage)
            over_kl = [(replace(rewards, note="The reward that PPO sees."), "objective/kl"), (taste, "objective/kl")]
            charts = [(rewards, "step"), *charts, *over_kl]
        for chart, x in charts + [(chart, "step") for chart in _router_charts(stage)]:
            lines = [Series(name, logged(stage, key, x), dots=x != "step") for name, key in chart.lines]
            # A line needs two points, and a chart a line.
            if drawn := tuple(line for line in lines if len(line.points) > 1):
                title = chart.title if x == "step" else f"{chart.title} against KL"
                label = "training steps" if x == "step" else "KL, nats per answer"
                found.append(Chart(stage.name, title, label, drawn, chart.note))
    return found


def _reward_charts(stage: StageResult) -> tuple[LoggedChart, LoggedChart]:
    """Return the charts of what PPO's rewards score, and of the annotators' hidden taste; means before weighting."""
    lines = [(match[1], match[0]) for match in _logged_keys(stage, r"rewards/(.+)/mean")]
    scores = tuple(line for line in lines if "taste" not in line[0])
    tastes = tuple(line for line in lines if "taste" in line[0])
    # A single reward is the reward model. Without its own key, the sum of all rewards is its score.
    title = "Rewards"
    if len(scores) < 2:
        title = "Reward-model score"
        scores = (("score", scores[0][1] if scores else "reward"),)
    hidden = "PPO does not see it. If it rises with the score, the reward model is not gamed."
    return LoggedChart(title, scores), LoggedChart("Hidden taste", tastes, hidden)


def _router_charts(stage: StageResult) -> list[LoggedChart]:
    """Return the load of each expert, a chart for each layer that has experts, and the entropy of their routers."""
    # "router/layer_0/expert_3" is the load of the fourth expert in the first layer that has experts.
    matches = _logged_keys(stage, r"router/layer_(\d+)/expert_(\d+)")
    experts = sorted((int(layer), int(expert)) for layer, expert in (match.groups() for match in matches))
    charts, entropies = [], []
    for layer, its_experts in groupby(experts, key=lambda pair: pair[0]):
        lines = tuple((f"expert {expert + 1}", f"router/layer_{layer}/expert_{expert}") for _, expert in its_experts)
        title = f"Load of the experts, layer {layer + 1}"
        charts.append(LoggedChart(title, lines, "Tokens over the fair number; 1 is balanced."))
        entropies.append((f"layer {layer + 1}", f"router/layer_{layer}/entropy"))
    return [*charts, LoggedChart("Entropy of the routers, nats", tuple(entropies))]


def _logged_keys(stage: StageResult, pattern: str) -> list[re.Match[str]]:
    keys = sorted({key for record in stage.history for key in record})
    return [match for key in keys if (match := re.fullmatch(pattern, key))]


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts with one line per run: its validation line if it has one, otherwise its first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            # Nobody could tell five runs with two lines each apart.
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
