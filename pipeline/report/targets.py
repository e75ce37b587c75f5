"""What a recipe promises, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.text import number

POCKET = Path(__file__).with_name("targets.yaml")
"""The promises of recipes/pocket."""
ROUNDING = 1e-9
"""0.87 - 0.90 keeps a promise of at least -0.03, whatever binary fractions say."""


@dataclass(frozen=True)
class Promise:
    """A bound on one figure.

    Args:
        stage: whose figure.
        metric: which figure.
        at_least: lower bound, or None.
        at_most: upper bound, or None.
        against: stage to compare with, or None for the figure itself.
        how: the comparison: "difference", "ratio", or "interval", the lower end of that of the paired
            difference.
        lower_end: whether the lower end of the figure's interval is held to the bound instead of the figure.
    """

    stage: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    against: str | None = None
    how: Literal["difference", "ratio", "interval"] = "difference"
    lower_end: bool = False

    def __str__(self) -> str:
        bound = f"at least {number(self.at_least, 2)}" if self.at_least is not None else ""
        if self.at_most is not None:
            bound = " and ".join(filter(None, [bound, f"at most {number(self.at_most, 2)}"]))
        label = f"{metric_info(self.metric).label} of {self.stage}"
        if self.against is None:
            return f"{label}{', lower end of the interval,' if self.lower_end else ''} {bound}"
        if self.how == "ratio":
            return f"{label} over {self.against}: {bound}"
        lower = ", lower end of the interval" if self.how == "interval" else ""
        return f"{label} minus {self.against}{lower}: {bound}"


@dataclass(frozen=True)
class Verdict:
    """A promise and what the run measured: `measured` is the figure that is held to the bound."""

    promise: Promise
    measured: float
    kept: bool


def load_promises(path: str | Path | None = None) -> list[Promise]:
    """The promises in a YAML file: a list of mappings with the fields of `Promise`.

    Args:
        path: the file; None for the promises of recipes/pocket.

    Raises:
        UserError: naming every entry that is wrong.
    """
    import yaml

    file = Path(path or POCKET)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(Problem("--promises", file, f"cannot be read: {error}")) from None
    if not isinstance(content, list):
        raise UserError(Problem("--promises", file, "must be a list of {stage, metric, at_least or at_most}"))
    problems = [
        Problem(f"{file}, entry {index}", entry, fault)
        for index, entry in enumerate(content, 1)
        if (fault := _fault(entry))
    ]
    if problems:
        raise UserError(*problems)
    return [Promise(**entry) for entry in content]


def _fault(entry: object) -> str:
    """What is wrong with an entry of the file, empty if nothing is."""
    if not isinstance(entry, dict):
        return "must be a mapping"
    known = {item.name for item in fields(Promise)}
    if unknown := sorted(str(key) for key in entry if key not in known):
        return f"unknown field {unknown[0]}; known are {', '.join(sorted(known))}"
    if not all(isinstance(entry.get(key), str) for key in ("stage", "metric")):
        return "stage and metric must be names"
    bounds = [entry[key] for key in ("at_least", "at_most") if key in entry]
    if not bounds or not all(isinstance(bound, int | float) for bound in bounds):
        return "at_least or at_most must be a number"
    if entry.get("how", "difference") not in ("difference", "ratio", "interval"):
        return "how must be difference, ratio or interval"
    return ""


def is_pocket(run: Run) -> bool:
    """Whether recipes/pocket's promises hold for the run: not for a miniature, nor for another recipe."""
    recipe = run.manifest.get("recipe")
    return not run.manifest.get("smoke") and (not isinstance(recipe, str) or Path(recipe).name == "pocket")


def judge(run: Run, found: Sequence[Difference], promises: Sequence[Promise]) -> list[Verdict]:
    """The promises that the run's stages can be held to, in order.

    Args:
        run: the run.
        found: its paired differences.
        promises: what it is held to; a promise about a stage that was not run is left out.
    """
    verdicts = []
    for promise in promises:
        measured = _measured(run, found, promise)
        if measured is None:
            continue
        kept = (promise.at_least is None or measured >= promise.at_least - ROUNDING) and (
            promise.at_most is None or measured <= promise.at_most + ROUNDING
        )
        verdicts.append(Verdict(promise, measured, kept))
    return verdicts


def _measured(run: Run, found: Sequence[Difference], promise: Promise) -> float | None:
    figure = _figure(run, promise.stage, promise.metric)
    if figure is None:
        return None
    if promise.against is None:
        return figure.low if promise.lower_end else figure.value
    other = _figure(run, promise.against, promise.metric)
    if other is None:
        return None
    if promise.how == "ratio":
        return figure.value / other.value if other.value else None
    if promise.how == "difference":
        return figure.value - other.value
    wanted = (promise.stage, promise.against, promise.metric)
    lows = [item.change.low for item in found if (item.stage, item.before, item.metric) == wanted]
    return lows[0] if lows else None


def _figure(run: Run, stage: str, metric: str) -> Estimate | None:
    return run.stages[stage].metrics.get(metric) if stage in run.stages else None
