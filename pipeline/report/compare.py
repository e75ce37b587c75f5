"""`python -m pipeline compare A… --against B…`: whether a change of the recipe helped.

    python -m pipeline compare runs/new --against runs/old
    python -m pipeline compare runs/new/seed* --against runs/old/seed* --output difference.json

A and B are runs, or folders of the runs of several seeds. Every figure that all runs have is compared, paired by seed
and by test row. Figures of reward models are paired by seed only, because each run makes its own pairs of answers.

The JSON maps each stage (and each baseline) and metric to A minus B as `{"value", "ci95", "n"}`. With one seed, the
interval is over the `n` rows. With several, it is Student's over the `n` seeds, and never narrower than the widest of
the intervals over rows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pipeline.errors import Problem, UserError
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.stage_order import stage_info

if TYPE_CHECKING:
    from pipeline.evaluation.intervals import Estimate
    from pipeline.evaluation.results import StageResult
    from pipeline.report.load import Run

    Pairs = Sequence[tuple[Run, Run]]
    Figures = dict[tuple[str, str], StageResult]
    Changes = dict[str, dict[str, Estimate]]

ROW = "  {:<32} {:>9} {:>9} {:>9}  {:<18} {}"
"""A line of the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare` to `parser`."""
    parser.add_argument("runs", nargs="+", metavar="A", help="run, or folder of the runs of several seeds")
    parser.add_argument("--against", nargs="+", required=True, metavar="B", help="what to compare A with, likewise")
    parser.add_argument("--output", metavar="FILE", help="file of the JSON (default: stdout, with the table on stderr)")


def main(args: argparse.Namespace) -> int:
    """Compare the runs, write the differences as JSON and print them as a table. Return 0.

    Raises:
        UserError: If a run cannot be read, the seeds or the test rows differ, or the file cannot be written.
    """
    from pipeline.files import check_directory, write_text
    from pipeline.report.load import load_runs
    from pipeline.report.seeds import find_seeds

    problems = []
    if args.output and Path(args.output).is_dir():
        problems.append(Problem("--output", args.output, "is a directory; name a file in it"))
    elif args.output and (problem := check_directory(Path(args.output).parent, "--output")):
        problems.append(problem)
    # A side may name runs, or folders with the runs of several seeds.
    sides = [[run for path in named for run in find_seeds(Path(path))] for named in (args.runs, args.against)]
    try:
        runs = load_runs([path for side in sides for path in side])
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    pairs, unpaired = pair_by_seed(runs[: len(sides[0])], runs[len(sides[0]) :])
    problems += [*unpaired, *check_rows(pairs)]
    if problems:
        raise UserError(*problems)
    for note in (note for run in runs for note in run.notes):
        print(note, file=sys.stderr)
    changes = compare(pairs)
    entries = {stage: {name: change.to_json() for name, change in of.items()} for stage, of in changes.items()}
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    # The JSON goes to the file or to stdout, and the table to where the JSON is not.
    if args.output:
        write_text(Path(args.output), text)
    else:
        print(text, end="")
    print(format_table(pairs, changes), file=sys.stdout if args.output else sys.stderr)
    return 0


def pair_by_seed(runs: Sequence[Run], against: Sequence[Run]) -> tuple[Pairs, list[Problem]]:
    """Return the pairs of runs of the same seed, in the order of `runs`, and a problem for each unpaired run."""
    problems = []
    ours: dict[str, Run] = {}
    theirs: dict[str, Run] = {}
    for side, its_runs, found in (("A", runs, ours), ("--against", against, theirs)):
        for run in its_runs:
            seed = str(run.record.get("seed"))
            if seed in found:
                remedy = f"has seed {seed}, as {found[seed].path} has; give one run for each seed"
                problems.append(Problem(side, run.path, remedy))
            found[seed] = run
    # A run without a partner would be compared with nothing, so it is an error rather than ignored.
    for side, found, others in (("A", ours, theirs), ("--against", theirs, ours)):
        for seed, run in found.items():
            if seed not in others:
                remedy = f"has seed {seed}, and no run on the other side has; make that run, or omit this one"
                problems.append(Problem(side, run.path, remedy))
    return [(run, theirs[seed]) for seed, run in ours.items() if seed in theirs], problems


def check_rows(pairs: Pairs) -> list[Problem]:
    """Report the pairs that have no figure in common, or were measured on different test rows."""
    problems = []
    for run, other in pairs:
        ours, theirs = _figures(run), _figures(other)
        shared = [name for name in ours if name in theirs]
        # Rows are compared by their content, so the same data in another file are the same rows. Each run has reward
        # models of its own with their own pairs.
        unequal = [
            f"{metric} of {stage}"
            for stage, metric in shared
            if stage_info(stage).generates
            and ours[stage, metric].outcomes(metric).keys() != theirs[stage, metric].outcomes(metric).keys()
        ]
        remedy = f"has no figure that {run.path} has; evaluate the same stages"
        if unequal:
            remedy = f"was measured on other test rows than {run.path} ({unequal[0]}); evaluate both on the same data"
        if unequal or not shared:
            problems.append(Problem("--against", other.path, remedy))
    return problems


def compare(pairs: Pairs) -> Changes:
    """Return the difference of every figure that all runs have, as stage -> metric -> estimate."""
    # numpy would slow `--help` down.
    from pipeline.evaluation.intervals import over_seeds

    figures = [(_figures(run), _figures(other)) for run, other in pairs]
    changes: Changes = {}
    for stage, metric in figures[0][0]:
        if all((stage, metric) in side for pair in figures for side in pair):
            found = [_difference(metric, *(side[stage, metric] for side in pair)) for pair in figures]
            bounds = (-1.0, 1.0) if metric_info(metric).share else ()
            changes.setdefault(stage, {})[metric] = over_seeds(found, *bounds)
    return changes


def _figures(run: Run) -> Figures:
    """Return the stage or baseline of each figure, by the names of both, in the order of training."""
    stages = {**run.stages, **run.baselines}
    return {
        (name, metric): stage for name, stage in stages.items() for metric in sorted(stage.metrics, key=metric_order)
    }


def _difference(metric: str, own: StageResult, other: StageResult) -> Estimate:
    """Return the paired difference of a metric; for reward models and without rows, as of independent estimates.

    The interval of the latter combines both intervals (Newcombe 1998, "Interval estimation for the difference between
    independent proportions", method 10).
    """
    from pipeline.evaluation.intervals import Estimate
    from pipeline.report.differences import paired

    change = paired(other.outcomes(metric), own.outcomes(metric), metric)
    if change is not None and stage_info(own.name).generates:
        return change
    a, b = own.metrics[metric], other.metrics[metric]
    value = a.value - b.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Estimate(value)
    # Newcombe's method 10 combines the distances from each value to its own ends.
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    return Estimate(value, low, value + math.hypot(a.high - a.value, b.value - b.low), a.n)


def format_table(pairs: Pairs, changes: Changes) -> str:
    """Format the differences, one per line, with the means of both sides over the seeds."""
    from pipeline.report.differences import judge
    from pipeline.report.text import interval, number, signed

    lines = [f"{name}: {', '.join(str(pair[side].path) for pair in pairs)}" for side, name in enumerate("AB")]
    lines.append(ROW.format("", "A", "B", "A - B", "95% interval", "").rstrip())
    for stage, found in changes.items():
        lines.append(stage)
        for metric, change in found.items():
            info, mark = metric_info(metric), judge(metric, change).replace("same", "")
            a, b = (fmean(_figures(pair[i])[stage, metric].metrics[metric].value for pair in pairs) for i in (0, 1))
            shown = (number(a, info.digits), number(b, info.digits), signed(change.value, info.digits))
            lines.append(ROW.format(info.label, *shown, interval(change, info.digits, sign=True), mark).rstrip())
    # One in twenty 95% intervals misses the truth.
    total = sum(map(len, changes.values()))
    lines.append(f"Without any true difference, about {total / 20:.0f} of {total} would be better or worse by chance.")
    everything = dict.fromkeys(name for pair in pairs for run in pair for name in _figures(run))
    if missing := [f"{metric} of {stage}" for stage, metric in everything if metric not in changes.get(stage, {})]:
        lines.append(f"Left out, because not every run has them: {', '.join(missing)}.")
    return "\n".join(lines)
