"""The stages: what they are called, which metrics each is trained to improve, and their order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageInfo:
    """A kind of stage, which is the word after the number in the name of its directory.

    Attributes:
        title: Its name for people.
        aims: The metrics that it is trained to improve, the main one first.
        generates: Whether the model writes text, and so is compared with the stage before it.
        trained: Whether there are training steps.
    """

    title: str
    aims: tuple[str, ...] = ()
    generates: bool = True
    trained: bool = True


STAGES: dict[str, StageInfo] = {
    "random": StageInfo("Random weights", trained=False),
    "base": StageInfo("The model to start from", trained=False),
    "pretrain": StageInfo("Pretraining", ("bits_per_byte",)),
    "sft": StageInfo("Instruction tuning", ("instruction_accuracy", "answer_bits_per_byte", "stop_rate")),
    "reward": StageInfo("Reward model", ("reward_accuracy", "reward_accuracy_noise_free"), generates=False),
    "judge": StageInfo("Reward model that judges", ("reward_accuracy",), generates=False),
    "ppo": StageInfo("Preference tuning (PPO)", ("win_rate", "win_rate_greedy")),
    "grpo": StageInfo("Reasoning (GRPO)", ("pass@1", "pass@1_sampled", "pass@8", "step_rate")),
}

BASELINES: dict[str, str] = {
    "elicited": "{against}, begun with",
    "constant": "{against}, always with",
    "majority": "Most frequent training answer of each kind",
}
"""Titles of the baselines, to which their texts are appended; `against` is the stage that others are compared with."""

EVALUATE = "evaluate_"
"""Prefix of the steps that evaluate a stage."""

_ORDER = ("random", "base", "pretrain", "sft", "preferences", "reward", "judge", "ppo", "grpo")
"""Order of stages with the same number."""


def stage_kind(stage: str) -> str:
    """Return the kind of a stage: "sft" for "2_sft" and "2_sft_again"."""
    kind = re.sub(r"^\d+_", "", stage)
    first = kind.partition("_")[0]
    return first if first in STAGES else kind


def twins(stages: Iterable[str]) -> list[str]:
    """Return the stages that only show what another architecture reaches: every pretraining but the first."""
    return [stage for stage in sorted(stages, key=stage_order) if stage_kind(stage) == "pretrain"][1:]


def stage_info(stage: str) -> StageInfo:
    """Return what is known about the stage directory `stage`, such as "2_sft"; a new kind has its own name as title."""
    kind = stage_kind(stage)
    return STAGES.get(kind) or StageInfo(kind.replace("_", " ").capitalize() or stage)


def stage_order(stage: str) -> tuple[int, int, str]:
    """Sort stages by the number of their directory, then by the order of training."""
    number = re.match(r"\d+", stage)
    kind = stage_kind(stage)
    rank = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
    return int(number.group()) if number else 1000, rank, stage


def step_order(step: str) -> tuple[int, int, str]:
    """Sort the steps of a run: making data comes first, then the stages, each followed by its evaluation."""
    stage = step.removeprefix(EVALUATE)
    number, rank, _ = stage_order(stage) if stage[:1].isdigit() else (-1, 0, "")
    return number, rank, step
