"""Differences on the same examples: gains of each stage, losses of earlier abilities, and differences between runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from pipeline.errors import Problem
from pipeline.evaluation.intervals import Estimate, confidence_of_each, mean_difference, over_seeds, simultaneous
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
    """The change of a metric from one stage or baseline to another stage, on the examples that both answered.

    Attributes:
        stage: Name of the later stage.
        reference: Name of the stage or baseline that it is compared with.
        metric: Name of the metric.
        change: The mean difference with its interval.
        was: Value of the metric in `reference`, on all of its examples.
        now: The same in `stage`.
        aim: Whether `stage` is trained to improve the metric.
        verdict: What `judge` says about the change.
    """

    stage: str
    reference: str
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
    changes: list[Difference] = []
    for stage in run.stages.values():
        if not stage_info(stage).generates or not stage.metrics:
            continue
        is_other_architecture = stage.name in run.other_architectures
        parent = run.parent_stage(stage)
        if parent is not None and is_other_architecture:
            # No stage starts from a second pretraining, so it is compared the other way: as the first one's baseline.
            changes += _between(stage, parent)
        elif parent is not None:
            changes += _between(parent, stage)
        variant = run.first_variant(stage)
        if variant is not None:
            changes += _between(variant, stage)
        if not is_other_architecture:
            # Baselines only matter for the metrics that their stage is trained for.
            for baseline in run.baselines.values():
                changes += [change for change in _between(baseline, stage) if change.aim]
    return changes


def _between(reference: StageResult, stage: StageResult) -> list[Difference]:
    """Return the differences in every metric that both stages have, those that `stage` is trained for first."""
    aims = stage_info(stage).aims
    shared = [name for name in stage.metrics if name in reference.metrics]
    changes = []
    for metric in sorted(shared, key=lambda name: (name not in aims, metric_order(name))):
        was = reference.metrics[metric]
        now = stage.metrics[metric]
        change = paired(reference.outcomes(metric), stage.outcomes(metric), metric, by_kind=bool(now.by_kind))
        if change is not None:
            verdict = judge(metric, change)
            is_aim = metric in aims
            changes.append(
                Difference(stage.name, reference.name, metric, change, was.value, now.value, is_aim, verdict)
            )
    return changes


def paired(earlier: Outcomes, later: Outcomes, metric: str = "", by_kind: bool = False) -> Estimate | None:
    """Return the mean difference on shared examples, None if there are none or none has a weight.

    Args:
        earlier: The outcomes that are subtracted, by example.
        later: The outcomes that they are subtracted from.
        metric: The metric, whose range bounds the interval.
        by_kind: Whether to return the difference for each kind of example as well.
    """
    shared = [key for key in earlier if key in later]
    weights = [later[key][1] for key in shared]
    # Without any weight, such as for documents without bytes, there is no mean.
    if sum(weights) <= 0:
        return None
    # Both sides answered the same examples, so the interval of the difference is narrower than both intervals.
    whole = mean_difference([later[key][0] - earlier[key][0] for key in shared], weights, metric_info(metric).share)
    parts = {}
    if by_kind:
        for kind in sorted({kind for _, _, kind in later.values()} - {""}):
            part = paired(earlier, {key: entry for key, entry in later.items() if entry[2] == kind}, metric)
            if part is not None:
                parts[kind] = part
    return replace(whole, by_kind=parts)


def judge(metric: str, change: Estimate) -> Literal["better", "worse", "same"]:
    """Return "better", "worse" or, if the interval contains 0 or neither direction is better, "same"."""
    better = metric_info(metric).better
    if not better or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    has_risen = change.value > 0
    return "better" if has_risen == (better == "up") else "worse"


def pair_by_seed(runs: Sequence[Run], against: Sequence[Run]) -> tuple[Pairs, list[Problem]]:
    """Return the pairs of runs of the same seed, and a problem for each unpaired run."""
    problems = []
    ours: dict[str, Run] = {}
    theirs: dict[str, Run] = {}
    for side, side_runs, by_seed in (("A", runs, ours), ("--against", against, theirs)):
        for run in side_runs:
            seed = str(run.record.get("seed"))
            if seed in by_seed:
                remedy = f"has seed {seed}, like {by_seed[seed].path}; give one run for each seed"
                problems.append(Problem(side, run.path, remedy))
            by_seed[seed] = run
    # A run without a partner could not be compared, so it is reported instead of ignored.
    for side, by_seed in (("A", ours), ("--against", theirs)):
        for seed, run in by_seed.items():
            if seed not in ours or seed not in theirs:
                remedy = f"has seed {seed}, but no run on the other side does; make that run, or omit this one"
                problems.append(Problem(side, run.path, remedy))
    return [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs], problems


def check_rows(pairs: Pairs) -> list[Problem]:
    """Report pairs without a common metric, or measured on different test rows."""
    problems = []
    for run, other in pairs:
        ours = _metrics_of(run)
        theirs = _metrics_of(other)
        shared = [name for name in ours if name in theirs]
        unequal = []
        for stage, metric in shared:
            # Rows are compared by their content, whatever the file. Each run has its own reward models and pairs.
            our_rows = ours[stage, metric].outcomes(metric).keys()
            their_rows = theirs[stage, metric].outcomes(metric).keys()
            if stage_info(ours[stage, metric]).generates and our_rows != their_rows:
                unequal.append(f"{metric} of {stage}")
        if unequal:
            remedy = f"was measured on different test rows than {run.path} ({unequal[0]}); use the same data for both"
            problems.append(Problem("--against", other.path, remedy))
        elif not shared:
            remedy = f"has no figure in common with {run.path}; evaluate the same stages"
            problems.append(Problem("--against", other.path, remedy))
    return problems


def note_other_settings(pairs: Pairs) -> list[str]:
    """Return a note for each stage that two runs measured differently, which may explain a difference."""
    notes = []
    for run, other in pairs:
        for name in sorted(run.stages.keys() & other.stages.keys()):
            ours = run.stages[name].settings
            theirs = other.stages[name].settings
            changed = [key for key in MEASURED if ours.get(key) != theirs.get(key)]
            if changed:
                notes.append(f"{other.path}: {name} measured with a different {' and '.join(changed)} than {run.path}")
    return notes


def compare(pairs: Pairs, tests: int = 1) -> Changes:
    """Return the difference of every metric that all runs have, as stage -> metric -> estimate.

    Args:
        pairs: The runs, in pairs of the same seed.
        tests: How many differences a conclusion is drawn from. The intervals are so wide that all of them hold together
            with 95%, not each.
    """
    results = [(_metrics_of(run), _metrics_of(other)) for run, other in pairs]
    changes: Changes = {}
    for stage, metric in results[0][0]:
        if not all((stage, metric) in side for pair in results for side in pair):
            continue
        bounds = (-1.0, 1.0) if metric_info(metric).share else (-math.inf, math.inf)
        by_seed = []
        for ours, theirs in results:
            change = _difference(ours[stage, metric], theirs[stage, metric], metric)
            by_seed.append(simultaneous(change, tests, *bounds))
        changes.setdefault(stage, {})[metric] = over_seeds(by_seed, *bounds, tests=tests)
    return changes


def _difference(ours: StageResult, theirs: StageResult, metric: str) -> Estimate:
    """Return our metric minus theirs, on shared rows if there are any and the rows do not depend on the run."""
    change = paired(theirs.outcomes(metric), ours.outcomes(metric), metric)
    if change is not None and stage_info(ours).generates:
        return change
    # Without shared rows, the estimates are independent, and the interval combines both (Newcombe 1998, "Interval
    # estimation for the difference between independent proportions", method 10).
    a = ours.metrics[metric]
    b = theirs.metrics[metric]
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high, a.n)


def _metrics_of(run: Run) -> dict[tuple[str, str], StageResult]:
    """Return the result of each stage or baseline for each of its metrics, in the order of the report."""
    results = {}
    for name, stage in (run.stages | run.baselines).items():
        for metric in sorted(stage.metrics, key=metric_order):
            results[name, metric] = stage
    return results


def format_table(pairs: Pairs, changes: Changes, tests: int = 1) -> str:
    """Format the differences, one per line, with the means of both sides over the seeds; `tests` as for `compare`."""
    row = "  {:<32} {:>9} {:>9} {:>9}  {:<18} {}"
    lines = [f"{name}: {', '.join(str(pair[side].path) for pair in pairs)}" for side, name in enumerate("AB")]
    percent = f"{100 * confidence_of_each(tests):.6g}%"
    lines.append(row.format("", "A", "B", "A - B", f"{percent} interval", "").rstrip())
    for stage, by_metric in changes.items():
        lines.append(stage)
        for metric, change in by_metric.items():
            info = metric_info(metric)
            means = []
            for side in (0, 1):
                mean = fmean(_metrics_of(pair[side])[stage, metric].metrics[metric].value for pair in pairs)
                means.append(number(mean, info.digits))
            difference = signed(change.value, info.digits)
            ends = interval(change, info.digits, sign=True)
            verdict = judge(metric, change).replace("same", "")
            lines.append(row.format(info.label, *means, difference, ends, verdict).rstrip())
    total = sum(map(len, changes.values()))
    if tests == 1:
        # One in twenty 95% intervals misses the truth.
        by_chance = f"about {total / 20:.0f} of {total} would be better or worse by chance."
    else:
        by_chance = f"one or more of {tests} such intervals would miss 0 in 5% of cases."
    lines.append(f"Without any true difference, {by_chance}")
    missing = []
    for stage, metric in dict.fromkeys(name for pair in pairs for run in pair for name in _metrics_of(run)):
        if metric not in changes.get(stage, {}):
            missing.append(f"{metric} of {stage}")
    if missing:
        lines.append(f"Omitted, because not every run has them: {', '.join(missing)}.")
    return "\n".join(lines)
