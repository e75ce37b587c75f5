"""Differences on the same examples: gains of each stage, losses of earlier abilities, and differences between runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from pipeline.errors import Problem
from pipeline.evaluation.intervals import Estimate, mean_difference, over_seeds
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.evaluation.results import Outcomes, StageResult
from pipeline.report.load import Run, stage_info
from pipeline.report.text import interval, number, signed

Pairs = Sequence[tuple[Run, Run]]
Changes = dict[str, dict[str, Estimate]]
MEASURED = ("max_new_tokens", "samples", "elicit", "shots", "best_of", "seed")
"""Keys of `evaluate.yaml` that say how a run is measured, whatever its data."""


@dataclass(frozen=True)
class Difference:
    """The change of a metric of `stage`, perhaps an aim, from `before` (a stage or baseline) on shared examples."""

    stage: str
    before: str
    metric: str
    change: Estimate
    was: float
    now: float
    aim: bool
    verdict: Literal["better", "worse", "same"]


def differences(run: Run) -> list[Difference]:
    """Return the differences of each stage from the one that it started from and, in its aims, from baselines.

    Of several stages of one kind that started from the same model, the later ones are also compared with the first.
    """
    others = run.twins
    found: list[Difference] = []
    for stage in run.stages.values():
        if not stage_info(stage).generates or not stage.metrics:
            continue
        before = run.origin(stage)
        # A second pretraining, which no stage starts from, is compared the other way: it is the first one's baseline.
        if before is not None:
            found.extend(_between(stage, before) if stage.name in others else _between(before, stage))
        if variant := run.first_variant(stage):
            found.extend(_between(variant, stage))
        # Baselines only matter for the metrics that their stage is trained for.
        for baseline in run.baselines.values() if stage.name not in others else ():
            found.extend(item for item in _between(baseline, stage) if item.aim)
    return found


def _between(before: StageResult, stage: StageResult) -> list[Difference]:
    aims, rows = stage_info(stage).aims, []
    shared = [name for name in stage.metrics if name in before.metrics]
    for metric in sorted(shared, key=lambda name: (name not in aims, metric_order(name))):
        was, now = before.metrics[metric], stage.metrics[metric]
        if change := paired(before.outcomes(metric), stage.outcomes(metric), metric, by_kind=bool(now.by_kind)):
            aim, verdict = metric in aims, judge(metric, change)
            rows.append(Difference(stage.name, before.name, metric, change, was.value, now.value, aim, verdict))
    return rows


def paired(before: Outcomes, after: Outcomes, metric: str = "", by_kind: bool = False) -> Estimate | None:
    """Return the mean difference on shared examples (also for each kind of them), None if there are none."""
    shared = [key for key in before if key in after]
    weights = [after[key][1] for key in shared]
    # Without any weight, such as for documents without bytes, there is no mean.
    if sum(weights) <= 0:
        return None
    # Both sides answered the same examples, so the interval of the difference is narrower than both intervals.
    whole = mean_difference([after[key][0] - before[key][0] for key in shared], weights, metric_info(metric).share)
    parts = {}
    for kind in sorted({kind for _, _, kind in after.values()} - {""}) if by_kind else []:
        if part := paired(before, {key: entry for key, entry in after.items() if entry[2] == kind}, metric):
            parts[kind] = part
    return replace(whole, by_kind=parts)


def judge(metric: str, change: Estimate) -> Literal["better", "worse", "same"]:
    """Return "better", "worse" or, if the interval contains 0 or neither direction is better, "same"."""
    better = metric_info(metric).better
    if not better or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    return "better" if (change.value > 0) == (better == "up") else "worse"


def pair_by_seed(runs: Sequence[Run], against: Sequence[Run]) -> tuple[Pairs, list[Problem]]:
    """Return the pairs of runs of the same seed, and a problem for each unpaired run."""
    problems = []
    ours: dict[str, Run] = {}
    theirs: dict[str, Run] = {}
    for side, its_runs, found in (("A", runs, ours), ("--against", against, theirs)):
        for run in its_runs:
            seed = str(run.record.get("seed"))
            if seed in found:
                remedy = f"has seed {seed}, like {found[seed].path}; give one run for each seed"
                problems.append(Problem(side, run.path, remedy))
            found[seed] = run
    # A run without a partner could not be compared, so it is reported instead of ignored.
    for side, found in (("A", ours), ("--against", theirs)):
        for seed in [seed for seed in found if seed not in ours or seed not in theirs]:
            remedy = f"has seed {seed}, but no run on the other side does; make that run, or omit this one"
            problems.append(Problem(side, found[seed].path, remedy))
    return [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs], problems


def check_rows(pairs: Pairs) -> list[Problem]:
    """Report pairs without a common figure, or measured on different test rows."""
    problems = []
    for run, other in pairs:
        ours, theirs = _figures(run), _figures(other)
        shared = [name for name in ours if name in theirs]
        unequal = []
        for stage, metric in shared:
            # Rows are compared by their content, whatever the file. Each run has its own reward models and pairs.
            rows, other_rows = (side[stage, metric].outcomes(metric).keys() for side in (ours, theirs))
            if stage_info(ours[stage, metric]).generates and rows != other_rows:
                unequal.append(f"{metric} of {stage}")
        remedy = f"has no figure in common with {run.path}; evaluate the same stages"
        if unequal:
            remedy = f"was measured on different test rows than {run.path} ({unequal[0]}); use the same data for both"
        if unequal or not shared:
            problems.append(Problem("--against", other.path, remedy))
    return problems


def other_settings(pairs: Pairs) -> list[str]:
    """Return a note for each stage that two runs measured differently, which may explain a difference."""
    notes = []
    for run, other in pairs:
        for name in sorted(run.stages.keys() & other.stages.keys()):
            mine, theirs = run.stages[name].settings, other.stages[name].settings
            if changed := [key for key in MEASURED if mine.get(key) != theirs.get(key)]:
                notes.append(f"{other.path}: {name} measured with a different {' and '.join(changed)} than {run.path}")
    return notes


def compare(pairs: Pairs) -> Changes:
    """Return the difference of every figure that all runs have, as stage -> metric -> estimate."""
    figures = [(_figures(run), _figures(other)) for run, other in pairs]
    changes: Changes = {}
    for stage, metric in figures[0][0]:
        if all((stage, metric) in side for pair in figures for side in pair):
            found = []
            for own, other in figures:
                ours, theirs = own[stage, metric], other[stage, metric]
                a, b = ours.metrics[metric], theirs.metrics[metric]
                change = paired(theirs.outcomes(metric), ours.outcomes(metric), metric)
                # Without shared rows, the estimates are independent, and the interval combines both (Newcombe 1998,
                # "Interval estimation for the difference between independent proportions", method 10).
                if change is None or not stage_info(ours).generates:
                    change = Estimate(a.value - b.value)
                    if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
                        low = change.value - math.hypot(a.value - a.low, b.high - b.value)
                        high = change.value + math.hypot(a.high - a.value, b.value - b.low)
                        change = Estimate(change.value, low, high, a.n)
                found.append(change)
            bounds = (-1.0, 1.0) if metric_info(metric).share else ()
            changes.setdefault(stage, {})[metric] = over_seeds(found, *bounds)
    return changes


def _figures(run: Run) -> dict[tuple[str, str], StageResult]:
    stages = (run.stages | run.baselines).items()
    return {(name, metric): stage for name, stage in stages for metric in sorted(stage.metrics, key=metric_order)}


def format_table(pairs: Pairs, changes: Changes) -> str:
    """Format the differences, one per line, with the means of both sides over the seeds."""
    row = "  {:<32} {:>9} {:>9} {:>9}  {:<18} {}"
    lines = [f"{name}: {', '.join(str(pair[side].path) for pair in pairs)}" for side, name in enumerate("AB")]
    lines.append(row.format("", "A", "B", "A - B", "95% interval", "").rstrip())
    for stage, found in changes.items():
        lines.append(stage)
        for metric, change in found.items():
            info, mark = metric_info(metric), judge(metric, change).replace("same", "")
            a, b = (fmean(_figures(pair[i])[stage, metric].metrics[metric].value for pair in pairs) for i in (0, 1))
            shown = (number(a, info.digits), number(b, info.digits), signed(change.value, info.digits))
            lines.append(row.format(info.label, *shown, interval(change, info.digits, sign=True), mark).rstrip())
    # One in twenty 95% intervals misses the truth.
    total = sum(map(len, changes.values()))
    lines.append(f"Without any true difference, about {total / 20:.0f} of {total} would be better or worse by chance.")
    everything = dict.fromkeys(name for pair in pairs for run in pair for name in _figures(run))
    if missing := [f"{metric} of {stage}" for stage, metric in everything if metric not in changes.get(stage, {})]:
        lines.append(f"Omitted, because not every run has them: {', '.join(missing)}.")
    return "\n".join(lines)
