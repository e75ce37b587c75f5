"""`python -m pipeline compare A… --against B…`: whether a change of the recipe helped.

    python -m pipeline compare runs/new --against runs/old
    python -m pipeline compare runs/new/seed* --against runs/old/seed* --output difference.json

    python -m pipeline compare runs/losses/4_grpo_dapo --against runs/losses/4_grpo

A and B are runs, or folders of the runs of several seeds, or stages of runs, whose names may differ. Every figure that
all runs have is compared, paired by seed and by test row (of reward models, by seed only). The JSON maps each stage or
baseline and metric to A minus B, as `{"value", "ci95", "n"}`: an interval over the `n` rows or, with several seeds,
Student's over the `n` seeds, which is at least as wide as the widest interval over rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import Problem, collect, refuse

if TYPE_CHECKING:
    from pipeline.report.load import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="A", help="run or stage, or folder of the runs of several seeds")
    parser.add_argument("--against", nargs="+", required=True, metavar="B", help="what to compare A with, likewise")
    parser.add_argument("--output", metavar="FILE", help="file of the JSON (default: stdout, with the table on stderr)")


def is_stage(path: Path) -> bool:
    """Return whether a path is a measured stage of a run, such as runs/losses/4_grpo."""
    return (path.parent / "evaluations" / f"{path.name}.json").is_file()


def keep_named_stages(paths: Sequence[Path], runs: Sequence[Run]) -> None:
    """Reduce the runs of which a path names a stage to that stage, under one name, so that they can be compared."""
    names = [path.name for path in paths if is_stage(path)]
    for path, run in zip(paths, runs, strict=False):
        if is_stage(path):
            run.path, run.baselines = path, {}
            run.stages = {names[0]: run.stages[path.name]}


def main(args: argparse.Namespace) -> int:
    """Compare the runs, write the differences as JSON and print them as a table. Return 0."""
    from pipeline.files import check_directory, write_text
    from pipeline.report.differences import check_rows, compare, format_table, other_settings, pair_by_seed
    from pipeline.report.load import load_runs
    from pipeline.report.seeds import find_seeds

    problems = []
    if args.output and Path(args.output).is_dir():
        problems.append(Problem("--output", args.output, "is a directory; name a file in it"))
    elif args.output and (problem := check_directory(Path(args.output).parent, "--output")):
        problems.append(problem)
    sides: list[list[Path]] = []
    for named in (args.runs, args.against):
        sides.append([])
        for path in map(Path, named):
            sides[-1] += [path] if is_stage(path) else find_seeds(path)
    runs = []
    paths = [path for side in sides for path in side]
    with collect(problems):
        runs = load_runs([path.parent if is_stage(path) else path for path in paths])
    keep_named_stages(paths, runs)
    pairs, unpaired = pair_by_seed(runs[: len(sides[0])], runs[len(sides[0]) :])
    problems += [*unpaired, *check_rows(pairs)]
    refuse(*problems)
    for note in [*(note for run in runs for note in run.notes), *other_settings(pairs)]:
        print(note, file=sys.stderr)
    changes = compare(pairs)
    entries = {stage: {name: change.to_json() for name, change in of.items()} for stage, of in changes.items()}
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    if args.output:
        write_text(Path(args.output), text)
    else:
        print(text, end="")
    print(format_table(pairs, changes), file=sys.stdout if args.output else sys.stderr)
    return 0
