"""What each stage gained, and what it cost the abilities before it, measured on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.evaluation.intervals import Estimate, ratio
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.labels import stage_info
from pipeline.report.load import Outcomes, Run, Stage


@dataclass(frozen=True)
class Difference:
    """How much a metric changed from one stage to the next.

    Args:
        stage: the later stage.
        before: the earlier one.
        metric: name of the metric.
        change: later minus earlier on the examples that both answered, with its 95% interval and n.
        was: the metric before.
        now: the metric after.
        aim: whether the stage is trained for this metric (else it is what the stage may cost).
        verdict: "better", "worse" or "same" (the interval holds 0, or neither direction is better).
    """

    stage: str
    before: str
    metric: str
    change: Estimate
    was: float
    now: float
    aim: bool
    verdict: str


def differences(run: Run) -> list[Difference]:
    """Every paired difference between a stage and the one it started from, its aims first."""
    found: list[Difference] = []
    before: Stage | None = None
    for stage in run.stages.values():
        if not stage_info(stage.name).speaks or not stage.metrics:
            continue
        if before is not None:
            found.extend(_between(before, stage))
        before = stage
    return found


def _between(before: Stage, stage: Stage) -> list[Difference]:
    aims = stage_info(stage.name).aims
    shared = [name for name in stage.metrics if name in before.metrics]
    rows = []
    for metric in sorted(shared, key=lambda name: (name not in aims, metric_order(name))):
        earlier, later = before.outcomes.get(metric, {}), stage.outcomes.get(metric, {})
        change = paired(earlier, later, by_kind=bool(stage.metrics[metric].by_kind))
        if change is None:
            continue
        rows.append(
            Difference(
                stage.name,
                before.name,
                metric,
                change,
                before.metrics[metric].value,
                stage.metrics[metric].value,
                metric in aims,
                _verdict(metric, change),
            )
        )
    return rows


def paired(before: Outcomes, after: Outcomes, by_kind: bool = False) -> Estimate | None:
    """The mean difference on shared examples, weighted, with its interval; None if they share none.

    Args:
        before: example id -> (value, weight, kind) of the earlier stage.
        after: the same of the later stage.
        by_kind: whether the difference of each kind of example is wanted too.
    """
    whole = _paired_interval(before, after)
    if whole is None:
        return None
    kinds = sorted({kind for _, _, kind in after.values()} - {""})
    parts = {}
    for kind in kinds if by_kind else []:
        part = _paired_interval(before, {key: entry for key, entry in after.items() if entry[2] == kind})
        if part is not None:
            parts[kind] = part
    return replace(whole, by_kind=parts)


def _paired_interval(before: Outcomes, after: Outcomes) -> Estimate | None:
    shared = [key for key in before if key in after]
    weights = [after[key][1] for key in shared]
    if sum(weights) <= 0:
        return None
    changes = [(after[key][0] - before[key][0]) * after[key][1] for key in shared]
    return ratio(changes, weights)


def _verdict(metric: str, change: Estimate) -> str:
    better = metric_info(metric).better
    if not better or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    return "better" if (change.value > 0) == (better == "up") else "worse"


def by_stage(found: Sequence[Difference]) -> Mapping[str, list[Difference]]:
    """The differences grouped by the later stage, in order."""
    groups: dict[str, list[Difference]] = {}
    for difference in found:
        groups.setdefault(difference.stage, []).append(difference)
    return groups
