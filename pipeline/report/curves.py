"""What each stage logged in training, and the curves of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.evaluation.intervals import finite
from pipeline.evaluation.results import StageResult
from pipeline.report.labels import stage_info
from pipeline.report.load import Run

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart: its points (x, y), drawn as dots without a line if `dots`."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        stage: Directory name of its stage.
        title: What is drawn.
        x_label: What the horizontal axis counts.
        series: One or more lines.
        note: A sentence about how to read it, or "".
    """

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""


def charts_of(run: Run) -> list[Chart]:
    """Return every chart for which the run logged at least two points, in the order of training."""
    charts: list[Chart] = []
    for stage in run.stages.values():
        info = stage_info(stage.name)
        if info.has_critic:
            title, keys = _scores(stage)
            series = [Series(name, logged(stage, key)) for name, key in keys.items()]
            charts.extend(_chart(stage.name, title, "training steps", series, ""))
        for chart in info.charts:
            series = [Series(name, logged(stage, key)) for name, key in chart.lines]
            charts.extend(_chart(stage.name, chart.title, "training steps", series, chart.note))
        if info.has_critic:
            charts.extend(_against_kl(stage))
        charts.extend(_routers(stage))
    return charts


def _chart(stage: str, title: str, x_label: str, series: Sequence[Series], note: str) -> list[Chart]:
    drawn = tuple(line for line in series if len(line.points) > 1)
    return [Chart(stage, title, x_label, drawn, note)] if drawn else []


def _against_kl(stage: StageResult) -> list[Chart]:
    """Return the reward model's score and the annotators' hidden taste, each over the KL to the initial policy."""
    charts = []
    title, scores = _scores(stage)
    tastes = {name: key for name, key in _reward_means(stage).items() if "taste" in name}
    hidden = "PPO does not see it. If it rises with the score, the reward model is not gamed."
    wanted = [(title, scores, "The reward that PPO sees."), ("Hidden taste", tastes, hidden)]
    for title, keys, note in wanted:
        series = [Series(name, _over_kl(stage, key), dots=True) for name, key in keys.items()]
        charts.extend(_chart(stage.name, f"{title} against KL", "KL, nats per answer", series, note))
    return charts


def _routers(stage: StageResult) -> list[Chart]:
    """Return the load of each expert, a chart for each layer that has experts, and the entropy of their routers."""
    keys = {key for record in stage.history for key in record if key.startswith("router/")}
    found = [match.groups() for key in keys if (match := re.fullmatch(r"router/layer_(\d+)/expert_(\d+)", key))]
    experts = sorted((int(layer), int(expert)) for layer, expert in found)
    charts = []
    for layer in dict.fromkeys(layer for layer, _ in experts):
        series = [
            Series(f"expert {expert + 1}", logged(stage, f"router/layer_{layer}/expert_{expert}"))
            for its_layer, expert in experts
            if its_layer == layer
        ]
        note = "Tokens over the fair number; 1 is balanced."
        charts += _chart(stage.name, f"Load of the experts, layer {layer + 1}", "training steps", series, note)
    layers = dict.fromkeys(layer for layer, _ in experts)
    series = [Series(f"layer {layer + 1}", logged(stage, f"router/layer_{layer}/entropy")) for layer in layers]
    return charts + _chart(stage.name, "Entropy of the routers, nats", "training steps", series, "")


def _scores(stage: StageResult) -> tuple[str, dict[str, str]]:
    """Return what PPO's rewards are called, and the logged key of each one's mean (before weighting) by its name."""
    rewards = {name: key for name, key in _reward_means(stage).items() if "taste" not in name}
    if len(rewards) > 1:
        return "Rewards", rewards
    return "Reward-model score", {"score": next(iter(rewards.values()), "reward")}


def _reward_means(stage: StageResult) -> dict[str, str]:
    """Return the key of each reward's mean, as logged in training, by the reward's name."""
    keys = {key for record in stage.history for key in record}
    found = (re.fullmatch(r"(?:eval_)?rewards/(.+)/mean", key) for key in keys)
    names = sorted({match.group(1) for match in found if match})
    return {name: f"rewards/{name}/mean" for name in names}


def _over_kl(stage: StageResult, key: str) -> Points:
    for prefix in ("", "eval_"):
        if len(points := logged(stage, prefix + key, f"{prefix}objective/kl")) > 1:
            return points
    return []


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts with one line per run: its validation line if it has one, otherwise its first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            chosen = next((line for line in chart.series if line.name == "validation"), chart.series[0])
            base = merged.setdefault((chart.stage, chart.title), replace(chart, series=()))
            merged[chart.stage, chart.title] = replace(base, series=(*base.series, replace(chosen, name=run.name)))
    return list(merged.values())


def logged(stage: StageResult, key: str, x: str = "step") -> list[tuple[float, float]]:
    """Return the points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    points = [(finite(record.get(x)), finite(record.get(key))) for record in stage.history]
    return [(at, value) for at, value in points if at is not None and value is not None]


def last_logged(stage: StageResult, key: str) -> float | None:
    """Return the last finite value that the stage logged under `key`, None if there is none."""
    return next((v for record in reversed(stage.history) if (v := finite(record.get(key))) is not None), None)


def alarms(run: Run) -> list[dict[str, Any]]:
    """Return `{"stage", "step", "what", "value"}` for each alarm that the trainers logged as `alarm/<what>`."""
    return [
        {"stage": stage.name, "step": int(step), "what": key.removeprefix("alarm/"), "value": value}
        for stage in run.stages.values()
        for key in dict.fromkeys(key for record in stage.history for key in record if key.startswith("alarm/"))
        for step, value in logged(stage, key)
    ]
