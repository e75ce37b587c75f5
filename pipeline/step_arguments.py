"""The settings of a recipe folder's steps, looked at before the first of them runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pkgutil import resolve_name
from typing import get_type_hints

from pipeline.arguments import check_values
from pipeline.errors import Problem
from pipeline.steps import KINDS, Step


def check_steps(steps: Iterable[Step]) -> list[Problem]:
    """Settings that a step would refuse as soon as it begins, which may be after hours.

    Args:
        steps: Those that are due. What has no YAML file of its own is passed over.

    Returns:
        Unknown fields, values of the wrong type and values out of range, under the step's name.
    """
    problems = []
    for step in steps:
        if step.kind not in KINDS or step.kind == "random":  # which reads the file of the pretraining
            continue
        kind = KINDS[step.kind]
        hints = get_type_hints(resolve_name(kind.entry or f"{kind.module}:main"))
        taken = [hint for name, hint in hints.items() if name != "return" and dataclasses.is_dataclass(hint)]
        found = check_values(step.values, taken) if taken else []
        problems += [dataclasses.replace(problem, field=f"{step.name}: {problem.field}") for problem in found]
    return problems
