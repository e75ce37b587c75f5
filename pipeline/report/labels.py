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


_ORDER = ("random", "pretrain", "sft", "preferences", "reward", "ppo", "grpo")
"""What stages of one number are sorted by."""


def _role(stage: str) -> str:
    return re.sub(r"^\d+_", "", stage)


def stage_info(stage: str) -> StageInfo:
    """What is known about the stage directory `stage`, such as "2_sft"; its own name if it is a new kind."""
    return STAGES.get(_role(stage)) or StageInfo(_role(stage).replace("_", " ").capitalize() or stage, "")


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
