"""`python -m pipeline compare A… --against B…`: whether a change of the recipe, or a variant of a stage, helped.

    python -m pipeline compare runs/new --against runs/old
    python -m pipeline compare runs/new/seed* --against runs/old/seed* --output difference.json
    python -m pipeline compare runs/losses/4_dapo runs/losses/4_grpo

A and B are runs, folders of the runs of several seeds, or folders of stages, whose names may differ. Every figure that
all runs have is compared, paired by seed and by test row (of reward models, by seed only). The JSON maps each stage (of
A) or baseline and metric to A minus B, as `{"value", "ci95", "n"}`: an interval over the `n` rows or, with several
seeds, Student's over the `n` seeds, which is at least as wide as the widest interval over rows.
"""

import argparse
import json
import sys
from pathlib import Path

from pipeline.errors import Problem, collect, refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="A", help="run, folder of the runs of several seeds, or stage")
    meaning = "what to compare A with, likewise (may be omitted between two folders of stages)"
    parser.add_argument("--against", nargs="+", metavar="B", help=meaning)
    parser.add_argument("--output", metavar="FILE", help="file of the JSON (default: stdout, with the table on stderr)")


def main(args: argparse.Namespace) -> int:
    """Compare the runs, write the differences as JSON and print them as a table. Return 0."""
    from pipeline.files import check_directory, write_text
    from pipeline.report.differences import check_rows, compare, format_table, other_settings, pair_by_seed
    from pipeline.report.load import is_stage, load_runs, only_stage
    from pipeline.report.seeds import find_seeds

    problems = []
    named, against = list(map(Path, args.runs)), list(map(Path, args.against or ()))
    if not against and len(named) == 2 and all(map(is_stage, named)):
        named, against = named[:1], named[1:]
    if not against:
        remedy = "the following arguments are required: --against (unless A are two folders of stages)"
        refuse(Problem("compare", " ".join(args.runs), remedy))
    if args.output and Path(args.output).is_dir():
        problems.append(Problem("--output", args.output, "is a directory; name a file in it"))
    elif args.output and (problem := check_directory(Path(args.output).parent, "--output")):
        problems.append(problem)
    sides = [[run for path in side for run in find_seeds(path)] for side in (named, against)]
    runs = []
    with collect(problems):
        paths = [path for side in sides for path in side]
        runs = load_runs([path.resolve().parent if is_stage(path) else path for path in paths])
        # Two stages are compared as if they were the same stage of two runs.
        label = next((path.resolve().name for path in paths if is_stage(path)), "")
        runs = [only_stage(run, path, label) if is_stage(path) else run for run, path in zip(runs, paths, strict=True)]
    pairs, unpaired = pair_by_seed(runs[: len(sides[0])], runs[len(sides[0]) :])
    problems += [*unpaired, *check_rows(pairs)]
    refuse(*problems)
    for note in dict.fromkeys([*(note for run in runs for note in run.notes), *other_settings(pairs)]):
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
