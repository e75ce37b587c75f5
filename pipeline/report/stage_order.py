"""The kind of a stage by the name of its directory, and the order in which stages and steps are shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.stages import STAGES
from pipeline.stages.kinds import StageKind

EVALUATE = "evaluate_"
"""Prefix of the steps that evaluate a stage."""


def stage_kind(stage: str) -> str:
    """Return the kind of a stage: "sft" for "2_sft" and "2_sft_again", and also for "sft"."""
    kind = re.sub(r"^\d+_", "", stage)
    first = kind.partition("_")[0]
    return first if first in STAGES else kind


def stage_info(stage: str) -> StageKind:
    """Return what is known about the stage directory `stage`, such as "2_sft"; a new kind has its own name as title."""
    kind = stage_kind(stage)
    if kind in STAGES and STAGES[kind].name:
        return STAGES[kind]
    return StageKind(name=kind.replace("_", " ").capitalize() or stage, trained=False)


def twins(stages: Iterable[str]) -> list[str]:
    """Return the stages that only show what another architecture reaches: every pretraining but the first."""
    return [stage for stage in sorted(stages, key=stage_order) if stage_info(stage).from_scratch][1:]


def stage_order(stage: str) -> tuple[int, int, str]:
    """Sort stages by the number of their directory, then by the order of training."""
    number = re.match(r"\d+", stage)
    kinds = [*STAGES, stage_kind(stage)]
    return int(number.group()) if number else 1000, kinds.index(kinds[-1]), stage


def step_order(step: str) -> tuple[int, int, str, bool]:
    """Sort the steps of a run: making data comes first, then the stages, each followed by its evaluation."""
    return *stage_order(step.removeprefix(EVALUATE)), step.startswith(EVALUATE)
