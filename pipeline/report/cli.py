"""`python -m pipeline report RUN [RUN …]`: the report of a run, or of one recipe under several seeds.

    python -m pipeline report runs/pocket
    python -m pipeline report runs/seed0 runs/seed1 runs/seed2 --output_dir runs/report

Needs no model and no accelerator: it reads what training and evaluation have written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report` to `parser`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, for instance runs/pocket")
    parser.add_argument(
        "--output_dir",
        help="where to write; by default RUN/report, and for several runs the first one's report/seeds",
    )
    parser.add_argument(
        "--promises",
        metavar="FILE",
        help="YAML file of the figures that the recipe promises; by default those of recipes/pocket",
    )


def main(args: argparse.Namespace) -> int:
    """Write the report of every run in `args.runs` and, over several, the one that compares them.

    Args:
        args: `runs` (list of str), `output_dir` (str or None), `promises` (str or None).

    Returns:
        Exit code 0. What could not be read is told on stderr, one line each, and in the report.

    Raises:
        UserError: a run does not exist or holds nothing to report, or the promises cannot be read.
    """
    from pipeline.errors import UserError
    from pipeline.files import below_a_file
    from pipeline.report.differences import differences
    from pipeline.report.load import load_runs
    from pipeline.report.page import write_report
    from pipeline.report.seeds import write_seeds
    from pipeline.report.targets import is_pocket, load_promises

    if args.output_dir and (problem := below_a_file(Path(args.output_dir), "--output_dir")):
        raise UserError(problem)
    promises = load_promises(args.promises)
    runs = load_runs([Path(run) for run in args.runs])
    for run in runs:
        for note in run.notes:
            print(note, file=sys.stderr)
    several = len(runs) > 1
    changes = [differences(run) for run in runs]
    for run, found in zip(runs, changes, strict=True):
        directory = Path(args.output_dir) if args.output_dir and not several else run.path / "report"
        held = promises if args.promises or is_pocket(run) else []
        print(write_report(run, found, held, directory))
    if several:
        directory = Path(args.output_dir) if args.output_dir else runs[0].path / "report" / "seeds"
        held = promises if args.promises or all(map(is_pocket, runs)) else []
        print(write_seeds(runs, changes, held, directory))
    return 0
