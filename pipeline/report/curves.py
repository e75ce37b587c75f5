"""Which curves the report shows: what was logged in training, by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.report.reading import Run, Stage, logged
from pipeline.report.vocabulary import stage_info

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
        ("Reward-model score", (("training", ("reward", "objective/scores")),), ""),
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

_SCORE_KEYS = ("reward", "objective/scores")
_KL_KEYS = ("objective/kl", "kl")


def charts_of(run: Run) -> list[Chart]:
    """Every chart for which the run logged at least two points, in the order of training."""
    charts: list[Chart] = []
    for stage in run.stages.values():
        role = stage.name.partition("_")[2]
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
    taste_keys = sorted({key for record in stage.history for key in record if "taste" in key and "std" not in key})
    wanted = [
        ("Reward-model score against KL", _SCORE_KEYS, "What PPO is given."),
        (
            "Hidden taste against KL",
            taste_keys,
            "What it is not shown: rising with the score, it is not gamed.",
        ),
    ]
    for title, keys, note in wanted:
        points: Points = []
        for prefix in ("", "eval_"):
            for kl in _KL_KEYS:
                points = points or next(
                    (found for key in keys if len(found := logged(stage, key, prefix + kl)) > 1), []
                )
        charts.extend(_chart(stage.name, title, "KL, nats an answer", [Series("batches", points, True)], note))
    return charts


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
