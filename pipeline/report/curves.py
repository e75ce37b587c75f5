"""What each stage logged in training, and the curves of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean
from typing import Any

from pyarrow.parquet import read_table

from pipeline.evaluation.intervals import finite
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run
from pipeline.report.stage_order import stage_info
from pipeline.stages.kinds import LoggedChart

Points = list[tuple[float, float]]

ROUTED = r"router/layer_(\d+)/expert_(\d+)"
"""Key under which the load of an expert is logged."""


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
    found: list[Chart] = []
    for stage in run.stages.values():
        # The charts of a kind stand in `pipeline.stages`; the others depend on the run's rewards and experts.
        info = stage_info(stage.name)
        charts = [_chart(stage, chart) for chart in info.charts]
        if info.data == "conversation" and charts and (easier := _easier_validation(run, stage)):
            charts[0] = replace(charts[0], note=f"{charts[0].note} {easier}".strip())
        if info.has_critic:
            rewards, taste = _reward_charts(stage)
            charts.insert(0, _chart(stage, rewards))
            charts.append(_chart(stage, replace(rewards, note="The reward that PPO sees."), over_kl=True))
            charts.append(_chart(stage, taste, over_kl=True))
        charts += [_chart(stage, chart) for chart in _router_charts(stage)]
        # A line needs two points, and a chart a line.
        drawn = [(chart, tuple(line for line in chart.series if len(line.points) > 1)) for chart in charts]
        found += [replace(chart, series=lines) for chart, lines in drawn if lines]
    return found


def _chart(stage: StageResult, logged_chart: LoggedChart, over_kl: bool = False) -> Chart:
    """Return a chart of what a stage logged, over its steps or against its KL."""
    x = "objective/kl" if over_kl else "step"
    lines = tuple(Series(name, logged(stage, key, x), dots=over_kl) for name, key in logged_chart.lines)
    title = f"{logged_chart.title} against KL" if over_kl else logged_chart.title
    label = "KL, nats per answer" if over_kl else "training steps"
    return Chart(stage.name, title, label, lines, logged_chart.note)


def _easier_validation(run: Run, stage: StageResult) -> str:
    """Return why a loss is lower in validation than in training, as the run's own data show it; "" if they do not."""
    losses = [[value for _, value in logged(stage, key)] for key in ("loss", "eval_loss")]
    files = [run.path / "data" / "sft" / f"{split}.parquet" for split in ("train", "validation")]
    if not all(losses) or losses[1][-1] > 0.8 * fmean(losses[0][-5:]) or not all(file.is_file() for file in files):
        return ""
    # The run generated these files itself.
    training, validation = (read_table(file, columns=["kind", "messages"]).to_pylist() for file in files)
    kinds = {row["kind"] for row in validation}
    shared = [row for row in training if row["kind"] in kinds]
    sizes = [fmean(len(row["messages"][-1]["content"]) for row in rows) for rows in (shared, validation)]
    reasons = []
    if missing := sorted({row["kind"] for row in training} - kinds):
        share = 1 - len(shared) / len(training)
        reasons.append(f"{share:.0%} of the training rows are of kinds that it lacks ({', '.join(missing)})")
    if sizes[0] > 1.1 * sizes[1]:
        reasons.append(f"in the other kinds, training answers are {sizes[0] / sizes[1]:.1f} times as long")
    return f"Validation is easier than training: {', and '.join(reasons)}." if reasons else ""


def _reward_charts(stage: StageResult) -> tuple[LoggedChart, LoggedChart]:
    """Return the charts of what PPO's rewards score, and of the annotators' hidden taste; means before weighting."""
    names = [match[1] for match in _logged_keys(stage, r"rewards/(.+)/mean")]
    scores = tuple((name, f"rewards/{name}/mean") for name in names if "taste" not in name)
    tastes = tuple((name, f"rewards/{name}/mean") for name in names if "taste" in name)
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
    experts = sorted((int(layer), int(expert)) for layer, expert in (m.groups() for m in _logged_keys(stage, ROUTED)))
    note = "Tokens over the fair number; 1 is balanced."
    charts, entropies = [], []
    for layer, its_experts in groupby(experts, key=lambda pair: pair[0]):
        lines = tuple((f"expert {expert + 1}", f"router/layer_{layer}/expert_{expert}") for _, expert in its_experts)
        charts.append(LoggedChart(f"Load of the experts, layer {layer + 1}", lines, note))
        entropies.append((f"layer {layer + 1}", f"router/layer_{layer}/entropy"))
    return [*charts, LoggedChart("Entropy of the routers, nats", tuple(entropies))]


def _logged_keys(stage: StageResult, pattern: str) -> list[re.Match[str]]:
    """Return the matches of a pattern with the keys that a stage logged, in the order of the keys."""
    keys = sorted({key for record in stage.history for key in record})
    return [match for key in keys if (match := re.fullmatch(pattern, key))]


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts with one line per run: its validation line if it has one, otherwise its first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            # Nobody could tell five runs with two lines each apart.
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
