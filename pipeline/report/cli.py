"""`python -m pipeline report RUN [RUN …]`: the report of a run, or of one recipe under several seeds.

    python -m pipeline report runs/pocket
    python -m pipeline report runs/seed0 runs/seed1 runs/seed2 --output_dir runs/report
    python -m pipeline report runs/pocket --seeds 0 1 2

Needs neither a model nor an accelerator: it reads what training and evaluation have written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import Problem, refuse


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
    from pipeline.files import check_directory, check_links
    from pipeline.report.differences import differences
    from pipeline.report.load import load_runs
    from pipeline.report.page import page_content, write_files
    from pipeline.report.seeds import write_seeds
    from pipeline.report.summary import summarise
    from pipeline.report.targets import is_pocket, load_targets

    folders = list(map(Path, args.runs))
    paths = _find_runs(folders, args.seeds)
    # A folder of seeds gets a report over them, even if it contains only one.
    is_several = paths != folders or len(paths) > 1
    # Where each report is written: one for each run and, if there are several runs, last the report over all of them.
    directories = [path / "report" for path in paths]
    # The folder that each report must stay in, even if its directory is a link: a folder that the user names.
    homes = [path if path in folders else path.parent for path in paths]
    if is_several:
        directories.append(folders[0] / "report" if paths[0] != folders[0] else directories[0] / "seeds")
        homes.append(folders[0])
    if args.output_dir:
        directories[-1] = Path(args.output_dir)
        homes[-1] = directories[-1]
    # Everything is read, and every output path tested, before anything is written.
    targets = load_targets(args.targets)
    runs = load_runs(paths)
    refuse(*_find_repeated(paths))
    for directory, home in zip(directories, homes, strict=True):
        # The files in it are replaced, even if they are links.
        refuse(*check_links(directory, home=home, field="RUN", inner=False))
    for directory in directories:
        refuse(check_directory(directory, "--output_dir" if args.output_dir else "RUN"))
    for run in runs:
        for note in run.notes:
            print(note, file=sys.stderr)
    changes = [differences(run) for run in runs]
    # The directory of the report over all runs, if there is one, is left over.
    for run, run_changes, directory in zip(runs, changes, directories, strict=False):
        # The targets of recipes/pocket do not apply to other recipes, unless the user names them.
        summary = summarise(run, run_changes, targets if args.targets or is_pocket(run) else [])
        print(write_files(directory, "report", summary, page_content(run, summary, run_changes)))
    if is_several:
        apply = args.targets or all(map(is_pocket, runs))
        print(write_seeds(runs, changes, targets if apply else [], directories[-1]))
    return 0


def _find_runs(folders: Sequence[Path], seeds: Sequence[str] | None) -> list[Path]:
    """Return the runs in the folders that the user names: only the runs of the `seeds`, or all if that is None."""
    from pipeline.report.seeds import find_seeds

    if seeds:
        return [folder / f"seed{seed}" for folder in folders for seed in seeds]
    return [run for folder in folders for run in find_seeds(folder)]


def _find_repeated(paths: Sequence[Path]) -> list[Problem]:
    """Return a problem for each run that is named twice, perhaps through a link: it is one run, not two seeds."""
    problems = []
    for index, path in enumerate(paths):
        same = next((earlier for earlier in paths[:index] if earlier.samefile(path)), None)
        if same is not None:
            problems.append(Problem("RUN", path, f"is the same directory as {same}; give one run for each seed"))
    return problems
