"""`python -m pipeline compare A… --against B…`: whether a change of the recipe, or a variant of a stage, helped.

    python -m pipeline compare runs/new --against runs/old
    python -m pipeline compare runs/new/seed* --against runs/old/seed* --output difference.json
    python -m pipeline compare runs/losses/4_dapo runs/losses/4_grpo
    python -m pipeline compare runs/alice --against runs/pocket --tests 20

A and B are runs, folders of the runs of several seeds, or folders of stages, whose names may differ. Every metric that
all runs have is compared, paired by seed and by test row (of reward models, by seed only). The JSON maps each stage (of
A) or baseline and metric to A minus B, as `{"value", "ci95", "n"}`: an interval over the `n` rows or, with several
seeds, Student's over the `n` seeds, which is at least as wide as the widest interval over rows.

If twenty recipes are compared with one, about one of twenty 95% intervals misses 0 by chance. With `--tests 20`, they
are wider (99.75% each), so that all twenty contain their true differences with 95% (Bonferroni). The entries of the
JSON then also have `tests`, and `ci95` is the wider interval.
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
    parser.add_argument("runs", nargs="+", metavar="A", help="run, folder of the runs of several seeds, or stage")
    meaning = "what to compare A with, likewise (may be omitted between two folders of stages)"
    parser.add_argument("--against", nargs="+", metavar="B", help=meaning)
    meaning = (
        "how many comparisons a conclusion is drawn from; intervals are wider, so that all hold together with 95%%"
    )
    parser.add_argument("--tests", type=int, default=1, metavar="N", help=f"{meaning} (default: 1)")
    parser.add_argument("--output", metavar="FILE", help="file of the JSON (default: stdout, with the table on stderr)")


def main(args: argparse.Namespace) -> int:
    """Compare the runs, write the differences as JSON and print them as a table. Return 0."""
    from pipeline.files import check_directory, write_text
    from pipeline.report.differences import check_rows, compare, format_table, note_other_settings, pair_by_seed
    from pipeline.report.load import is_stage
    from pipeline.report.seeds import find_seeds

    ours = list(map(Path, args.runs))
    theirs = list(map(Path, args.against or ()))
    # `compare STAGE STAGE` means `compare STAGE --against STAGE`.
    if not theirs and len(ours) == 2 and all(map(is_stage, ours)):
        ours, theirs = ours[:1], ours[1:]
    if not theirs:
        remedy = "the following arguments are required: --against (it may only be omitted between two stages)"
        refuse(Problem("compare", " ".join(args.runs), remedy))
    problems = []
    if args.tests < 1:
        problems.append(Problem("--tests", args.tests, "is not a number of comparisons; give 1 or more"))
    if args.output and Path(args.output).is_dir():
        problems.append(Problem("--output", args.output, "is a directory; name a file in it"))
    elif args.output:
        problem = check_directory(Path(args.output).parent, "--output")
        if problem:
            problems.append(problem)
    our_paths = [run for path in ours for run in find_seeds(path)]
    their_paths = [run for path in theirs for run in find_seeds(path)]
    runs: list[Run] = []
    with collect(problems):
        runs = _load(our_paths + their_paths)
    pairs, unpaired = pair_by_seed(runs[: len(our_paths)], runs[len(our_paths) :])
    problems += [*unpaired, *check_rows(pairs)]
    refuse(*problems)

    notes = [note for run in runs for note in run.notes]
    for note in dict.fromkeys([*notes, *note_other_settings(pairs)]):
        print(note, file=sys.stderr)
    changes = compare(pairs, args.tests)
    entries = {}
    for stage, by_metric in changes.items():
        entries[stage] = {metric: change.to_json() for metric, change in by_metric.items()}
        if args.tests > 1:
            for entry in entries[stage].values():
                entry["tests"] = args.tests
    text = json.dumps(entries, indent=1, allow_nan=False) + "\n"
    table = format_table(pairs, changes, args.tests)
    if args.output:
        write_text(Path(args.output), text, is_named=True)
        print(table)
    else:
        print(text, end="")
        print(table, file=sys.stderr)
    return 0


def _load(paths: Sequence[Path]) -> list[Run]:
    """Load the runs at `paths`; for the folder of a stage, its run with that stage alone."""
    from pipeline.report.load import is_stage, load_runs, with_only_stage

    runs = load_runs([path.resolve().parent if is_stage(path) else path for path in paths])
    # All stages get the name of the first one, because only stages of the same name are compared.
    label = next((path.resolve().name for path in paths if is_stage(path)), "")
    loaded = []
    for run, path in zip(runs, paths, strict=True):
        loaded.append(with_only_stage(run, path, label) if is_stage(path) else run)
    return loaded
