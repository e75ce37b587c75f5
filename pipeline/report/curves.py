"""Which curves the report shows: what was logged in training, by stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.report.labels import stage_info
from pipeline.report.load import Run, Stage, logged

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart: `points` are (x, y); `dots` draws them without a line."""

    name: str
    points: Points
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        stage: directory name of the stage that it belongs to.
        title: what is drawn.
        x_label: what the horizontal axis counts.
        series: one or more lines.
        note: a sentence about how to read it, or "".
    """

    stage: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    note: str = ""


# role of a stage -> charts as (title, ((name of the line, keys tried in order), ...), note)
_STEP_CHARTS: dict[str, tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...], str], ...]] = {
    "pretrain": (
        ("Loss, nats a token", (("training", ("loss",)), ("validation", ("eval_loss",))), ""),
        ("Bits per byte, validation", (("validation", ("eval_bits_per_byte", "bits_per_byte")),), ""),
    ),
    "sft": (
        ("Loss, nats a token", (("training", ("loss",)), ("validation", ("eval_loss",))), "Answers only."),
        (
            "Token accuracy",
            (("training", ("mean_token_accuracy",)), ("validation", ("eval_mean_token_accuracy",))),
            "",
        ),
    ),
    "reward": (
        (
            "Reward-model accuracy",
            (("training", ("accuracy",)), ("validation", ("eval_accuracy",))),
            "Pairs in which the preferred answer scores higher; 0.5 is chance.",
        ),
        ("Loss", (("training", ("loss",)), ("validation", ("eval_loss",))), ""),
    ),
    "ppo": (
        (
            "What PPO maximises",
            (("score", ("objective/scores",)), ("score minus KL penalty", ("objective/rlhf_reward",))),
            "Scores as normalised for training.",
        ),
        ("KL from the start, nats an answer", (("KL", ("objective/kl", "kl")),), ""),
        ("Entropy, nats a token", (("entropy", ("policy/entropy_avg", "entropy")),), ""),
        ("Answer length, tokens", (("mean", ("completions/mean_length",)),), ""),
    ),
    "grpo": (
        ("Reward", (("training", ("reward",)), ("validation", ("eval_reward",))), "Correctness alone."),
        ("Entropy, nats a token", (("entropy", ("entropy",)),), ""),
        (
            "Answer length, tokens",
            (("mean", ("completions/mean_length",)), ("validation", ("eval_completions/mean_length",))),
            "No reward mentions length.",
        ),
    ),
}

_KL_KEYS = ("objective/kl", "kl")


def charts_of(run: Run) -> list[Chart]:
    """Every chart for which the run logged at least two points, in the order of training."""
    charts: list[Chart] = []
    for stage in run.stages.values():
        role = stage.name.partition("_")[2]
        if role == "ppo":
            title, keys = _scores(stage)
            series = [Series(name, logged(stage, key)) for name, key in keys.items()]
            charts.extend(_chart(stage.name, title, "training steps", series, ""))
        for title, lines, note in _STEP_CHARTS.get(role, ()):
            series = [Series(name, _first_logged(stage, keys)) for name, keys in lines]
            charts.extend(_chart(stage.name, title, "training steps", series, note))
        if role == "ppo":
            charts.extend(_against_kl(stage))
    return charts


def _first_logged(stage: Stage, keys: Sequence[str]) -> Points:
    for key in keys:
        if points := logged(stage, key):
            return points
    return []


def _chart(stage: str, title: str, x_label: str, series: Sequence[Series], note: str) -> list[Chart]:
    drawn = tuple(line for line in series if len(line.points) > 1)
    return [Chart(stage, title, x_label, drawn, note)] if drawn else []


def _against_kl(stage: Stage) -> list[Chart]:
    """The reward model's score and the annotators' hidden taste, each over the distance from the start."""
    charts = []
    title, scores = _scores(stage)
    tastes = {name: key for name, key in _reward_means(stage).items() if "taste" in name}
    wanted = [
        (f"{title} against KL", scores, "What PPO is given."),
        ("Hidden taste against KL", tastes, "What it is not shown: rising with the score, it is not gamed."),
    ]
    for title, keys, note in wanted:
        series = [Series(name, _over_kl(stage, key), dots=True) for name, key in keys.items()]
        charts.extend(_chart(stage.name, title, "KL, nats an answer", series, note))
    return charts


def _scores(stage: Stage) -> tuple[str, dict[str, str]]:
    """What PPO is rewarded by, before weights: what it is called, and the key of each reward's mean by its name."""
    rewards = {name: key for name, key in _reward_means(stage).items() if "taste" not in name}
    if len(rewards) > 1:
        return "Rewards", rewards
    return "Reward-model score", {"score": next(iter(rewards.values()), "reward")}


def _reward_means(stage: Stage) -> dict[str, str]:
    """The key of each reward's mean, as it is logged in training, by the reward's name."""
    keys = {key for record in stage.history for key in record}
    found = (re.fullmatch(r"(?:eval_)?rewards/(.+)/mean", key) for key in keys)
    names = sorted({match.group(1) for match in found if match})
    return {name: f"rewards/{name}/mean" for name in names}


def _over_kl(stage: Stage, key: str) -> Points:
    for prefix in ("", "eval_"):
        for kl in _KL_KEYS:
            if len(points := logged(stage, prefix + key, prefix + kl)) > 1:
                return points
    return []


def overlay(runs: Sequence[Run]) -> list[Chart]:
    """The charts of several runs as one: of each run the validation line, or else the first."""
    merged: dict[tuple[str, str], Chart] = {}
    for run in runs:
        for chart in charts_of(run):
            chosen = next((line for line in chart.series if line.name == "validation"), chart.series[0])
            line = replace(chosen, name=run.name)
            key = (chart.stage, chart.title)
            base = merged.get(key) or replace(chart, series=())
            merged[key] = replace(base, series=(*base.series, line))
    return list(merged.values())


def heading(chart: Chart) -> str:
    """The chart's full title, for people who hear it: stage and what is drawn."""
    return f"{stage_info(chart.stage).title}: {chart.title}"
