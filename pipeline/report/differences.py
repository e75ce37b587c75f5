"""The gains of each stage, and its costs to earlier abilities, measured on the same examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline.evaluation.intervals import Estimate, mean_difference
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.evaluation.results import Outcomes, StageResult
from pipeline.report.load import Run
from pipeline.report.stage_order import stage_info, twins


@dataclass(frozen=True)
class Difference:
    """How much a metric changed from one stage to the next, or from a baseline to a stage.

    Attributes:
        stage: The later stage.
        before: The earlier one, or the baseline.
        metric: Name of the metric.
        change: Later minus earlier on the examples that both answered.
        was: The metric before.
        now: The metric after.
        aim: Whether the stage is trained for this metric.
        verdict: "same" if the interval contains 0 or neither direction is better.
    """

    stage: str
    before: str
    metric: str
    change: Estimate
    was: float
    now: float
    aim: bool
    verdict: Literal["better", "worse", "same"]

    @property
    def is_main(self) -> bool:
        """Whether it is an aim or a cost."""
        return self.aim or self.verdict == "worse"


def differences(run: Run) -> list[Difference]:
    """Return every paired difference between a stage and the one that it started from, aims first.

    The aims of a stage are also compared with the baselines, and pretraining with a second pretraining, of another
    architecture.
    """
    others = twins(run.stages)
    found: list[Difference] = []
    before: StageResult | None = None
    for stage in run.stages.values():
        if not stage_info(stage.name).generates or not stage.metrics:
            continue
        # A second pretraining, of another architecture, is not what the next stage starts from. It stands before the
        # first one in the difference, which says what the first one's architecture brings.
        if stage.name in others:
            if before is not None:
                found.extend(_between(stage, before))
            continue
        if before is not None:
            found.extend(_between(before, stage))
        # Baselines reach something only in what their stage is trained for.
        for baseline in run.baselines.values():
            found.extend(item for item in _between(baseline, stage) if item.aim)
        before = stage
    return found


def _between(before: StageResult, stage: StageResult) -> list[Difference]:
    aims = stage_info(stage.name).aims
    shared = [name for name in stage.metrics if name in before.metrics]
    rows = []
    for metric in sorted(shared, key=lambda name: (name not in aims, metric_order(name))):
        was, now = before.metrics[metric], stage.metrics[metric]
        change = paired(before.outcomes(metric), stage.outcomes(metric), metric, by_kind=bool(now.by_kind))
        if change is not None:
            aim, verdict = metric in aims, judge(metric, change)
            rows.append(Difference(stage.name, before.name, metric, change, was.value, now.value, aim, verdict))
    return rows


def paired(before: Outcomes, after: Outcomes, metric: str = "", by_kind: bool = False) -> Estimate | None:
    """Return the mean difference on shared examples (also for each kind of them), None if there are none.

    Without a `metric`, anything can be compared.
    """
    shared = [key for key in before if key in after]
    weights = [after[key][1] for key in shared]
    # Without any weight, for instance of documents without bytes, there is no mean.
    if sum(weights) <= 0:
        return None
    # Both sides answered the same examples, so the interval of the difference is narrower than both of theirs.
    whole = mean_difference([after[key][0] - before[key][0] for key in shared], weights, metric_info(metric).share)
    parts = {}
    for kind in sorted({kind for _, _, kind in after.values()} - {""}) if by_kind else []:
        part = paired(before, {key: entry for key, entry in after.items() if entry[2] == kind}, metric)
        if part is not None:
            parts[kind] = part
    return replace(whole, by_kind=parts)


def judge(metric: str, change: Estimate) -> Literal["better", "worse", "same"]:
    """Return whether a change is for the better; "same" if its interval contains 0 or neither direction is better."""
    better = metric_info(metric).better
    if not better or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    return "better" if (change.value > 0) == (better == "up") else "worse"
