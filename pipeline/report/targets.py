"""Targets: bounds on metrics that a recipe promises, and whether a run meets them.

- {stage: 4_grpo, metric: pass@1, at_least: 0.6}
- {stage: 4_grpo, metric: pass@1, against: 2_sft, at_least: 0.1}      # by at least 0.1 better than 2_sft
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.errors import Problem, UserError, refuse
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.text import number

POCKET = Path(__file__).parent / "templates" / "targets.yaml"
"""The targets of recipes/pocket."""
ROUNDING = 1e-9
"""Tolerance, so that 0.87 - 0.90 meets a bound of -0.03 in floating point."""


@dataclass(frozen=True)
class Target:
    """A bound on one metric of a stage or a baseline.

    Attributes:
        stage: Name of the stage or baseline.
        metric: Name of the metric.
        at_least: Lower bound, None for none.
        at_most: Upper bound, None for none.
        against: Stage or baseline that `stage` is compared with; None bounds the metric itself.
        how: What is bounded if there is an `against`: the difference, the ratio, or the lower end of the interval of
            the paired difference.
        lower_end: Whether to bound the lower end of the metric's interval, if there is no `against`.
    """

    stage: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    against: str | None = None
    how: Literal["difference", "ratio", "interval"] = "difference"
    lower_end: bool = False

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds or not all(isinstance(bound, int | float) for bound in bounds):
            raise ValueError("at_least or at_most must be a number")
        if self.how not in ("difference", "ratio", "interval"):
            raise ValueError("how must be difference, ratio or interval")

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        bound = " and ".join(f"{name} {number(value, 2)}" for name, value in bounds if value is not None)
        label = f"{metric_info(self.metric).label} of {self.stage}"
        if self.against is None and self.lower_end:
            return f"{label}, lower end of the interval, {bound}"
        if self.against is None:
            return f"{label} {bound}"
        if self.how == "ratio":
            return f"{label} over {self.against}: {bound}"
        if self.how == "interval":
            return f"{label} minus {self.against}, lower end of the interval: {bound}"
        return f"{label} minus {self.against}: {bound}"


def load_targets(path: str | Path | None = None) -> list[Target]:
    """Load targets from a YAML file, a list of mappings with the fields of `Target`; by default, of recipes/pocket."""
    file = Path(path or POCKET)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(Problem("--targets", file, f"cannot be read: {error}")) from None
    if not isinstance(content, list):
        raise UserError(Problem("--targets", file, "must be a list of {stage, metric, at_least or at_most}"))
    targets = []
    problems = []
    for index, entry in enumerate(content, 1):
        try:
            targets.append(Target(**entry))
        except (TypeError, ValueError) as error:
            # The error may be "Target.__init__() got an unexpected keyword argument 'atleast'", whose beginning says
            # nothing to a user.
            problems.append(Problem("--targets", f"{file}, entry {index}", str(error).rpartition("() ")[2]))
    refuse(*problems)
    return targets


def is_pocket(run: Run) -> bool:
    """Return whether the targets of recipes/pocket apply: not to a miniature, nor to another recipe.

    They also apply if the recipe was not recorded.
    """
    recipe = run.record.get("recipe")
    return not run.is_smoke and (not isinstance(recipe, str) or Path(recipe).name == "pocket")


def check_targets(run: Run, changes: Sequence[Difference], targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Check which targets a run meets.

    Args:
        run: The run.
        changes: Its differences between stages.
        targets: The targets.

    Returns:
        For each target that the run measured, in order: the target in words (`promise`), the value (`measured`), and
        whether it is within the bounds (`kept`).
    """
    results = []
    for target in targets:
        measured = _measure(run, changes, target)
        if measured is not None:
            low = -math.inf if target.at_least is None else target.at_least - ROUNDING
            high = math.inf if target.at_most is None else target.at_most + ROUNDING
            results.append({"promise": str(target), "measured": measured, "kept": low <= measured <= high})
    return results


def _measure(run: Run, changes: Sequence[Difference], target: Target) -> float | None:
    """Return the value that a target bounds, None if the run did not measure it."""
    estimate = _find_estimate(run, target.stage, target.metric)
    if estimate is None:
        return None
    if not target.against:
        return estimate.low if target.lower_end else estimate.value
    reference = _find_estimate(run, target.against, target.metric)
    if reference is None:
        return None
    if target.how == "ratio":
        return estimate.value / reference.value if reference.value else None
    if target.how == "difference":
        return estimate.value - reference.value
    # The lower end of the interval of the paired difference.
    for change in changes:
        if (change.stage, change.reference, change.metric) == (target.stage, target.against, target.metric):
            return change.change.low
    return None


def _find_estimate(run: Run, name: str, metric: str) -> Estimate | None:
    """Return a metric of a stage or baseline, None if it was not measured."""
    result = run.stages.get(name) or run.baselines.get(name)
    if result is None:
        return None
    return result.metrics.get(metric)
