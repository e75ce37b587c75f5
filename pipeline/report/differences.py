"""Differences of metrics on the same examples: between two stages of a run, and between two runs.

`differences` compares each stage of a run with the one that it started from and with baselines, for `report`.
`compare` compares the same stage of two recipes, one pair of runs for each seed, for `python -m pipeline compare`. Both
subtract example by example (`paired_difference`), so that examples that are hard for both sides do not widen the
interval.
"""

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
"""Runs A and B of the same seed, one pair for each seed."""
Changes = dict[str, dict[str, Estimate]]
"""A minus B, by stage or baseline and then by metric."""
Verdict = Literal["better", "worse", "same"]
MEASUREMENT_KEYS = ("max_new_tokens", "samples", "elicit", "shots", "best_of", "seed")
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
        now: Value of the metric in `stage`, on all of its examples.
        aim: Whether `stage` is trained to improve the metric.
        verdict: The direction of the change, as `judge_change` returns it.
    """

    stage: str
    reference: str
    metric: str
    change: Estimate
    was: float
    now: float
    aim: bool
    verdict: Verdict


def differences(run: Run) -> list[Difference]:
    """Return the differences of each stage from the stage that it started from and from other references.

    These are the baselines, in the metrics that the stage is trained for, and the first variant: if several stages of
    one kind started from the same model, the later ones are compared with the first.
    """
    changes: list[Difference] = []
    for stage in run.stages.values():
        if not stage_info(stage).generates or not stage.metrics:
            continue
        is_other_architecture = stage.name in run.other_architectures
        parent = run.parent_stage(stage)
        if parent is not None and is_other_architecture:
            # No stage starts from a second pretraining, so it is compared the other way: as the first one's baseline.
            changes += _between(run, stage, parent)
        elif parent is not None:
            changes += _between(run, parent, stage)
        variant = run.first_variant(stage)
        if variant is not None:
            changes += _between(run, variant, stage)
        if not is_other_architecture:
            for baseline in run.baselines.values():
                # In other metrics, a difference from a baseline says nothing about the training.
                changes += [change for change in _between(run, baseline, stage) if change.aim]
    return changes


def _between(run: Run, reference: StageResult, stage: StageResult) -> list[Difference]:
    """Return the differences in the metrics that two stages of a run share, beginning with the aims of `stage`."""
    aims = run.aims_of(stage)
    shared = [name for name in stage.metrics if name in reference.metrics]
    changes = []
    for metric in sorted(shared, key=lambda name: (name not in aims, metric_order(name))):
        was = reference.metrics[metric]
        now = stage.metrics[metric]
        outcomes = (reference.outcomes(metric), stage.outcomes(metric))
        change = paired_difference(*outcomes, metric, by_kind=bool(now.by_kind))
        if change is None:
            continue
        difference = Difference(
            stage=stage.name,
            reference=reference.name,
            metric=metric,
            change=change,
            was=was.value,
            now=now.value,
            aim=metric in aims,
            verdict=judge_change(metric, change),
        )
        changes.append(difference)
    return changes


def paired_difference(earlier: Outcomes, later: Outcomes, metric: str = "", by_kind: bool = False) -> Estimate | None:
    """Return the mean of `later` minus `earlier` over the examples in both, weighted as in `later`.

    Args:
        earlier: The outcomes that are subtracted, by example.
        later: The outcomes that they are subtracted from.
        metric: The metric, whose range bounds the interval.
        by_kind: Whether to return the difference for each kind of example as well.

    Returns:
        The difference with its interval, None if no example is in both or the weights of these examples are all 0.
    """
    values = []
    weights = []
    for key, (earlier_value, _, _) in earlier.items():
        if key in later:
            later_value, weight, _ = later[key]
            values.append(later_value - earlier_value)
            weights.append(weight)
    # Without any weight, such as for documents without bytes, there is no mean.
    if sum(weights) <= 0:
        return None
    whole = mean_difference(values, weights, metric_info(metric).share)
    parts = {}
    if by_kind:
        for kind in sorted({kind for _, _, kind in later.values()} - {""}):
            of_kind = {key: outcome for key, outcome in later.items() if outcome[2] == kind}
            part = paired_difference(earlier, of_kind, metric)
            if part is not None:
                parts[kind] = part
    return replace(whole, by_kind=parts)


def judge_change(metric: str, change: Estimate) -> Verdict:
    """Return whether a change of a metric is "better" or "worse".

    It is "same" if its interval contains 0 or is unknown, or if the metric has no better direction.
    """
    better = metric_info(metric).better
    if not better or change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "same"
    has_risen = change.value > 0
    return "better" if has_risen == (better == "up") else "worse"


def pair_by_seed(runs: Sequence[Run], against: Sequence[Run]) -> tuple[Pairs, list[Problem]]:
    """Return the pairs of runs of the same seed, and a problem for each run without a partner or with a seed twice."""
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
    # A run without a partner cannot be compared. It is reported, because ignoring it would change the result silently.
    for side, by_seed in (("A", ours), ("--against", theirs)):
        for seed, run in by_seed.items():
            if seed not in ours or seed not in theirs:
                remedy = f"has seed {seed}, but no run on the other side does; make that run, or omit this one"
                problems.append(Problem(side, run.path, remedy))
    return [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs], problems


def check_rows(pairs: Pairs) -> list[Problem]:
    """Return a problem for each pair of runs that has no metric in common, or was measured on different test rows."""
    problems = []
    for run, other in pairs:
        ours = _metrics_of(run)
        theirs = _metrics_of(other)
        shared = [name for name in ours if name in theirs]
        unequal = []
        for stage, metric in shared:
            # Rows are compared by a hash of their content, whatever the file. Stages that do not generate are reward
            # models, which each run tests on its own pairs.
            our_rows = ours[stage, metric].outcomes(metric).keys()
            their_rows = theirs[stage, metric].outcomes(metric).keys()
            if stage_info(ours[stage, metric]).generates and our_rows != their_rows:
                unequal.append(f"{metric} of {stage}")
        if unequal:
            remedy = f"was measured on different test rows than {run.path} ({unequal[0]}); use the same data for both"
            problems.append(Problem("--against", other.path, remedy))
        elif not shared:
            remedy = f"has no metric in common with {run.path}; evaluate the same stages"
            problems.append(Problem("--against", other.path, remedy))
    return problems


def note_other_settings(pairs: Pairs) -> list[str]:
    """Return a note for each stage that was measured with other settings in B than in A, which may explain a change."""
    notes = []
    for run, other in pairs:
        for name in sorted(run.stages.keys() & other.stages.keys()):
            ours = run.stages[name].settings
            theirs = other.stages[name].settings
            changed = [key for key in MEASUREMENT_KEYS if ours.get(key) != theirs.get(key)]
            if changed:
                notes.append(f"{other.path}: {name} measured with a different {' and '.join(changed)} than {run.path}")
    return notes


def compare(pairs: Pairs, tests: int = 1) -> Changes:
    """Return A minus B for every metric that all runs have, by stage or baseline and then by metric.

    Args:
        pairs: The runs, in pairs of the same seed.
        tests: How many comparisons a conclusion is drawn from. The intervals are so wide that all of them contain their
            true differences with 95% (see `pipeline.report.compare`).
    """
    results = [(_metrics_of(run), _metrics_of(other)) for run, other in pairs]
    changes: Changes = {}
    first_run, _ = results[0]
    for stage, metric in first_run:
        has_all = all((stage, metric) in ours and (stage, metric) in theirs for ours, theirs in results)
        if not has_all:
            continue
        bounds = (-1.0, 1.0) if metric_info(metric).share else (-math.inf, math.inf)
        by_seed = []
        for ours, theirs in results:
            change = _difference(ours[stage, metric], theirs[stage, metric], metric)
            by_seed.append(simultaneous(change, tests, *bounds))
        changes.setdefault(stage, {})[metric] = over_seeds(by_seed, *bounds, tests=tests)
    return changes


def _difference(ours: StageResult, theirs: StageResult, metric: str) -> Estimate:
    """Return our metric minus theirs.

    The difference is paired by test row if the sides have rows in common. Reward models are never paired, since each
    run tests its own on its own pairs.
    """
    change = paired_difference(theirs.outcomes(metric), ours.outcomes(metric), metric)
    if change is not None and stage_info(ours).generates:
        return change
    # Without common rows, the estimates are independent, and the interval combines both (Newcombe 1998, "Interval
    # estimation for the difference between independent proportions", method 10). It is unknown if either one is.
    a = ours.metrics[metric]
    b = theirs.metrics[metric]
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Estimate(value, low, high, a.n)


def _metrics_of(run: Run) -> dict[tuple[str, str], StageResult]:
    """Return the results of a run's stages and baselines by (name, metric), in the order of the report.

    A stage with three metrics has three entries, whose values are the same `StageResult`.
    """
    results = {}
    for name, stage in (run.stages | run.baselines).items():
        for metric in sorted(stage.metrics, key=metric_order):
            results[name, metric] = stage
    return results


def format_table(pairs: Pairs, changes: Changes, tests: int = 1) -> str:
    """Format the differences as a table for a terminal: one line per metric, with the means of A and B over the seeds.

    Args:
        pairs: The runs, in pairs of the same seed.
        changes: What `compare` returned for them.
        tests: How many comparisons a conclusion is drawn from, as for `compare`.
    """
    row = "  {:<32} {:>9} {:>9} {:>9}  {:<18} {}"
    lines = []
    for side, name in enumerate("AB"):
        paths = [str(pair[side].path) for pair in pairs]
        lines.append(f"{name}: {', '.join(paths)}")
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
            verdict = judge_change(metric, change).replace("same", "")
            lines.append(row.format(info.label, *means, difference, ends, verdict).rstrip())
    total = sum(map(len, changes.values()))
    if tests == 1:
        # One in twenty 95% intervals misses the truth.
        by_chance = f"about {total / 20:.0f} of {total} would be better or worse by chance."
    else:
        by_chance = f"one or more of {tests} such intervals would miss 0 in 5% of cases."
    lines.append(f"Without any true difference, {by_chance}")
    omitted = _omitted_metrics(pairs, changes)
    if omitted:
        lines.append(f"Omitted, because not every run has them: {', '.join(omitted)}.")
    return "\n".join(lines)


def _omitted_metrics(pairs: Pairs, changes: Changes) -> list[str]:
    """Return the metrics that were not compared, because not every run has them, as "pass@1 of 4_grpo"."""
    omitted: dict[str, None] = {}
    for pair in pairs:
        for run in pair:
            for stage, metric in _metrics_of(run):
                if metric not in changes.get(stage, {}):
                    omitted[f"{metric} of {stage}"] = None
    return list(omitted)
