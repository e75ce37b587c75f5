"""`python -m pipeline report RUN [RUN …]`: the report of a run, or of one recipe under several seeds.

    python -m pipeline report runs/pocket
    python -m pipeline report runs/seed0 runs/seed1 runs/seed2 --output_dir runs/report
    python -m pipeline report runs/pocket --seeds 0 1 2

Needs neither a model nor an accelerator: it reads what training and evaluation have written.
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, for instance runs/pocket")
    meaning = "report over RUN/seed0, RUN/seed1 and so on (default: all of them, if RUN is not a run itself)"
    parser.add_argument("--seeds", nargs="+", metavar="N", help=meaning)
    meaning = "where to write (default: RUN/report; if several runs are named, report/seeds in the first)"
    parser.add_argument("--output_dir", help=meaning)
    meaning = "YAML file of the figures that the recipe promises (default: those of recipes/pocket)"
    parser.add_argument("--targets", "--promises", metavar="FILE", help=meaning)


def main(args: argparse.Namespace) -> int:
    """Write the report of every run in `args.runs` and, for several, a report over all of them. Return 0."""
    from pipeline.errors import refuse
    from pipeline.files import check_directory
    from pipeline.report.differences import differences
    from pipeline.report.load import load_runs
    from pipeline.report.page import contents, write_files
    from pipeline.report.seeds import find_seeds, write_seeds
    from pipeline.report.targets import is_pocket, load_targets

    named = list(map(Path, args.runs))
    paths = [path / f"seed{seed}" for path in named for seed in args.seeds or ()]
    paths = paths or [run for path in named for run in find_seeds(path)]
    several = paths != named or len(paths) > 1
    directories = [path / "report" for path in paths]
    if several:
        directories.append(named[0] / "report" if paths[0] != named[0] else directories[0] / "seeds")
    if args.output_dir:
        directories[-1] = Path(args.output_dir)
    # Everything is read, and every output path tested, before anything is written.
    targets = load_targets(args.targets)
    runs = load_runs(paths)
    for directory in directories:
        refuse(check_directory(directory, "--output_dir" if args.output_dir else "RUN"))
    for note in (note for run in runs for note in run.notes):
        print(note, file=sys.stderr)
    changes = [differences(run) for run in runs]
    # The targets of recipes/pocket do not apply to other recipes, unless the user names them.
    held = [targets if args.targets or is_pocket(run) else [] for run in runs]
    for run, found, of_run, directory in zip(runs, changes, held, directories, strict=False):
        print(write_files(directory, "report", *contents(run, found, of_run)))
    if several:
        print(write_seeds(runs, changes, targets if all(held) else [], directories[-1]))
    return 0
