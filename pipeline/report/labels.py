"""What the report calls the stages and the metrics, and which metric each stage is for."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class StageInfo:
    """What a stage is, found by the word after the number in its directory's name.

    Args:
        title: what it is called.
        lesson: what the model learns there.
        aims: the metrics that the stage is trained to improve.
        speaks: whether the model writes text and is what the next stage starts from.
    """

    title: str
    lesson: str
    aims: tuple[str, ...] = ()
    speaks: bool = True


STAGES: dict[str, StageInfo] = {
    "random": StageInfo("Random weights", "nothing yet"),
    "pretrain": StageInfo("Pretraining", "language: it continues text", ("bits_per_byte",)),
    "sft": StageInfo("Instruction tuning", "to answer, and to stop", ("instruction_accuracy", "stop_rate")),
    "reward": StageInfo(
        "Reward model",
        "to tell which answer people prefer",
        ("reward_accuracy", "reward_accuracy_noise_free"),
        speaks=False,
    ),
    "ppo": StageInfo("Preference tuning (PPO)", "what people prefer", ("win_rate",)),
    "grpo": StageInfo(
        "Reasoning (GRPO)",
        "to be right where there is one right answer",
        ("pass@1", "pass@1_sampled", "pass@8", "step_rate"),
    ),
}


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is shown.

    Args:
        label: its name for people.
        meaning: one line about what is measured.
        better: "up", "down", or "" where neither direction is better.
        digits: digits after the point.
        share: whether it lies between 0 and 1.
    """

    label: str
    meaning: str
    better: str = "up"
    digits: int = 3
    share: bool = True


METRICS: dict[str, MetricInfo] = {
    "bits_per_byte": MetricInfo("Bits per byte", "held-out text; 8 is no compression at all", "down", share=False),
    "instruction_accuracy": MetricInfo(
        "Instruction accuracy", "held-out questions, summaries and small functions (code is run)"
    ),
    "stop_rate": MetricInfo("Stop rate", "answers that the model ends by itself"),
    "reward_accuracy": MetricInfo("Reward accuracy", "held-out pairs, against the noisy labels"),
    "reward_accuracy_noise_free": MetricInfo(
        "Reward accuracy, noise-free", "held-out pairs, against the annotators' taste without the noise"
    ),
    "win_rate": MetricInfo("Win rate", "against 2_sft, judged by the annotators with the order blinded"),
    "pass@1": MetricInfo("pass@1", "held-out reasoning problems, greedy answers"),
    "pass@1_sampled": MetricInfo("pass@1, sampled", "the same problems, mean over sampled answers"),
    "pass@8": MetricInfo("pass@8", "at least one of eight samples is right (unbiased estimate)"),
    "step_rate": MetricInfo("Step rate", "greedy answers that show worked steps", ""),
    "mean_length": MetricInfo("Answer length", "tokens of an answer to an instruction", "", 1, share=False),
    "reasoning_length": MetricInfo(
        "Reasoning length", "tokens of a greedy answer to a reasoning problem", "", 1, share=False
    ),
    "reward_margin": MetricInfo("Reward margin", "score of the preferred answer minus the other's", "", share=False),
    "reward_calibration_error": MetricInfo(
        "Calibration error", "between the scores' probabilities and the labels, beyond what chance makes", "down"
    ),
    "reward_length_correlation": MetricInfo(
        "Correlation with length", "of the reward model's score with an answer's words", "", share=False
    ),
}
"""In the order in which they are shown; metrics that are not named here come after them."""


_ORDER = ("random", "pretrain", "sft", "preferences", "reward", "ppo", "grpo")
"""What stages of one number are sorted by."""


def _role(stage: str) -> str:
    return re.sub(r"^\d+_", "", stage)


def stage_info(stage: str) -> StageInfo:
    """What is known about the stage directory `stage`, such as "2_sft"; its own name if it is a new kind."""
    return STAGES.get(_role(stage)) or StageInfo(_role(stage).replace("_", " ").capitalize() or stage, "")


def metric_info(metric: str) -> MetricInfo:
    """How the metric is shown; by its own name, with no better direction, if it is not known."""
    return METRICS.get(metric) or MetricInfo(metric.replace("_", " "), "", "")


def stage_order(stage: str) -> tuple[int, int, str]:
    """Sort key: the number of the directory's name, then the order of training."""
    number = re.match(r"\d+", stage)
    rank = _ORDER.index(_role(stage)) if _role(stage) in _ORDER else len(_ORDER)
    return int(number.group()) if number else 1000, rank, stage


def step_order(step: str) -> tuple[int, int, str]:
    """Sort key of any step of a run: making data, then the stages, each followed by its evaluation."""
    stage = step.removeprefix("evaluate_")
    number, rank, _ = stage_order(stage) if stage[:1].isdigit() else (-1, 0, "")
    return number, rank, step


def is_share(metric: str) -> bool:
    """Whether the metric is known to lie between 0 and 1."""
    return metric in METRICS and METRICS[metric].share


def metric_order(metric: str) -> tuple[int, str]:
    """Sort key of a metric's name."""
    names = list(METRICS)
    return names.index(metric) if metric in names else len(names), metric
