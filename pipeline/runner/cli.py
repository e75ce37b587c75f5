"""`fourstage run RECIPES`: run the steps of a recipe folder in order, each only when it is due.

With `--seeds`, the run `--seed N --output_dir RUN/seedN` of each seed N follows the one before, and RUN/report is the
report over all. A failed step ends the command: the other seeds have the same configuration, and would often fail, too.
"""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config.recipe_folder import LAUNCH_FILE
from pipeline.errors import Problem, as_typed, collect, refuse
from pipeline.files import as_list, check_links, lock
from pipeline.runner.console import is_live, show_checks
from pipeline.runner.due import Decisions
from pipeline.runner.launcher import check_launch_file, exit_code, find_launch_file
from pipeline.runner.plan import Recipe, read_recipe
from pipeline.runner.processes import WarmProcess, run_command
from pipeline.runner.records import TRASH, share_steps
from pipeline.runner.session import LOCK_FILE, CheckedRun, RunOptions, check_run, run_steps
from pipeline.runner.steps import REPORT, Step, find_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", type=Path, help="folder of YAML files, or the name of one that is installed, such as pocket")
    meaning = "run this step and all later ones, even if they have finished; the steps it needs must have finished"
    meaning += "; with --seeds, new seeds share the steps before it with <run>"
    add("--from", dest="start", metavar="STEP", help=meaning)
    add("--until", metavar="STEP", help="stop after this step, its evaluation and the report")
    meaning = "delete the output of these steps (default: all, from --from on), and run them and what needs them"
    add("--force", nargs="*", metavar="STEP", help=meaning)
    add("--dry-run", action="store_true", help="print which steps would run and why; write nothing")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="seed of every step (default: the seeds in the YAML files)")
    meaning = "one run for each of these seeds, in <run>/seedN, and the report over them in <run>/report"
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="N", help=meaning)
    add("--output_dir", type=Path, help="directory of the run (default: the one in the YAML files)")
    add("--num_processes", type=int, help="processes of each training step (default: as in the launch file)")
    places = f"{LAUNCH_FILE}, in the recipe folder or in the current one"
    add("--config_file", help=f"launch file of accelerate (default: {places})")
    meaning = "command that starts training steps on all machines of a cluster, such as 'srun --ntasks-per-node=1'"
    add("--launcher", default="", help=meaning)
    meaning = "download the models and data of the recipe into the cache, for machines without internet, and stop"
    add("--download", action="store_true", help=meaning)
    add("--no-fork", action="store_true", help="start each step as a new process that imports the libraries itself")
    add("--plain", action="store_true", help="print a line for each event instead of a live view")
    add("--verbose", action="store_true", help="print the steps' output, which is also in <run>/logs")
    add("--smoke", action="store_true", help="two steps of every stage on a miniature, in <run>-smoke")


def main(args: argparse.Namespace) -> int:
    """Run or print the steps that are due. Return 0, a failed step's exit code, or 128 + its signal.

    Raises:
        UserError: If the recipe folder or an argument is wrong, or another run is writing to the same directory.
    """
    began = time.monotonic()
    options = _read_options(args)
    with show_checks(options.recipe, options.plain, options.verbose):
        refuse(*_check_arguments(args, options))
    recipe = read_recipe(options.recipe)
    with _start_warm_process(args) as warm:
        if args.seeds is not None:
            return _run_seeds(recipe, options, args.seeds, warm, began)
        run = check_run(recipe, options)
        if options.dry_run:
            _print_decisions(run.decisions, options)
            return 0
        if args.download:
            # Importing it takes seconds.
            from pipeline.hub.download import download

            return download([step.values for step in run.plan.steps], recipe.home)
        return run_steps(run, warm, began)


def _read_options(args: argparse.Namespace) -> RunOptions:
    """Return the options of a run, from which the options of each seed are derived if there are several (`--seeds`)."""
    force: tuple[str, ...] | None = None
    if args.force is not None:
        force = tuple(args.force)
    return RunOptions(
        recipe=args.recipe,
        resume_command=_resume_command(args),
        launch_file=find_launch_file(args.recipe, args.config_file),
        output_dir=args.output_dir,
        seed=args.seed,
        start=args.start,
        until=args.until,
        force=force,
        num_processes=args.num_processes,
        launcher=tuple(shlex.split(args.launcher)),
        smoke=args.smoke,
        dry_run=args.dry_run,
        plain=args.plain,
        verbose=args.verbose,
    )


def _resume_command(args: argparse.Namespace) -> str:
    """Return the command that resumes the run, for all seeds if there are several.

    It leaves out `--from` and `--force`, which would repeat finished steps.
    """
    words = ["run", str(args.recipe)]
    for name in ("until", "seed", "seeds", "output_dir", "num_processes", "config_file", "launcher"):
        value = getattr(args, name)
        if value is not None and value != "":
            words += [f"--{name}", *map(str, as_list(value))]
    if args.smoke:
        words.append("--smoke")
    return as_typed(*words)


def _check_arguments(args: argparse.Namespace, options: RunOptions) -> list[Problem]:
    """Return what is wrong with the numbers on the command line, and with the launch file."""
    problems: list[Problem] = []
    if args.num_processes is not None and args.num_processes < 1:
        problems.append(Problem("--num_processes", args.num_processes, "must be at least 1"))
    launch_problem = check_launch_file(options.launch_file, is_named=args.config_file is not None)
    if launch_problem is not None:
        problems.append(launch_problem)
    option = "--seeds"
    seeds = args.seeds
    if seeds is None:
        option = "--seed"
        seeds = [args.seed or 0]
    for seed in seeds:
        if not 0 <= seed < 2**32:
            problems.append(Problem(option, seed, f"must be between 0 and {2**32 - 1}"))
        elif seeds.count(seed) > 1:
            problems.append(Problem(option, seed, "is repeated; name each seed once"))
    return problems


def _start_warm_process(args: argparse.Namespace) -> contextlib.AbstractContextManager[WarmProcess | None]:
    """Start the process from which steps are forked, so that it imports the libraries while this one checks the steps.

    Return a context that yields it. The context yields None if steps cannot be forked, because each of them needs
    several processes, or if no step runs.
    """
    is_alone = args.num_processes in (None, 1) and not args.launcher
    runs_nothing = args.dry_run or args.download
    if sys.platform == "linux" and is_alone and not args.no_fork and not runs_nothing:
        return WarmProcess(os.environ)
    return contextlib.nullcontext()


def _run_seeds(
    recipe: Recipe, options: RunOptions, seeds: Sequence[int], warm: WarmProcess | None, began: float
) -> int:
    """Run the steps of each seed and the report over them, or print them for `--dry-run`. Return the exit code.

    Args:
        recipe: The recipe.
        options: Options of the command; the directory of a seed is `seedN` inside `output_dir`.
        seeds: The seeds, in the order in which they run.
        warm: Process from which steps are forked; None to start each as a new process.
        began: Time at which the command began, by `time.monotonic`.
    """
    plan = recipe.plan(options.output_dir, smoke=options.smoke)
    run_dir = plan.run_dir
    refuse(*check_links(*(run_dir / f"seed{seed}" for seed in seeds), home=run_dir, inner=False))
    first_steps = _first_steps(plan.steps, plan.seed, run_dir, options, seeds)
    if first_steps and not options.dry_run:
        # This raises an error if a step that the seeds would share is due in the run itself.
        check_run(recipe, replace(options, output_dir=run_dir))
        for seed, step in first_steps.items():
            share_steps(plan.steps[: plan.steps.index(step)], run_dir, run_dir / f"seed{seed}", step.name)

    # Every seed is checked before the first one runs.
    problems: list[Problem] = []
    runs: list[CheckedRun] = []
    for seed in seeds:
        seed_options = replace(options, seed=seed, output_dir=run_dir / f"seed{seed}")
        if seed in first_steps:
            # In a new run, nothing is repeated: it lacks these steps, or shares them with RUN.
            seed_options = replace(seed_options, start=None)
        with collect(problems):
            runs.append(check_run(recipe, seed_options))
    refuse(*problems)
    report = Step(REPORT, "report", ("report", str(run_dir), "--seeds", *map(str, seeds)), run_dir / "report")
    command = options.command(report)
    is_reported = all(run.decisions[-1][0].kind == "report" for run in runs)
    if options.dry_run:
        _print_seeds(runs, first_steps)
        if is_reported:
            print(f"run the report over the seeds\n    {command}")
        return 0
    with lock(run_dir / LOCK_FILE, orphans_only=True) as descriptors:
        for run in runs:
            if not is_live(options.plain, options.verbose):
                print(f"seed {run.options.seed}, in {run.plan.run_dir}:")
            code = run_steps(run, warm, began)
            if code:
                print(f"seed {run.options.seed} ended with exit code {code}; the others were not run")
                return code
        if not is_reported:
            return 0
        print(f"$ {command}")
        code, received, _ = run_command(options.executable(report), os.environ, descriptors, warm=warm)
        if received is not None:
            return 128 + int(received)
        return exit_code(code)


def _first_steps(
    steps: Sequence[Step], own_seed: int | None, run_dir: Path, options: RunOptions, seeds: Sequence[int]
) -> dict[int, Step]:
    """Return the first step that each new seed runs itself, if it shares the earlier steps with the run in `run_dir`.

    With `--from`, new seeds share the steps before it with the run. The run's own seed shares everything but the
    report, which is about a single run.

    Args:
        steps: The steps of the run.
        own_seed: Seed of the run, None if it has none.
        run_dir: Directory of the run.
        options: Options of the command.
        seeds: The seeds of the command.

    Returns:
        The step, by seed. Seeds that have a run already are left out; without `--from`, nothing is shared, and the
        result is {}.
    """
    if options.start is None:
        return {}
    start = find_step(steps, options.start, "--from")
    first_steps: dict[int, Step] = {}
    for seed in seeds:
        if (run_dir / f"seed{seed}" / "run.json").exists():
            continue
        first_steps[seed] = start
        if seed == own_seed:
            first_steps[seed] = steps[-1]
    return first_steps


def _print_seeds(runs: Sequence[CheckedRun], first_steps: Mapping[int, Step]) -> None:
    """Print what would be done about each seed's steps, without the steps that it would share with the run.

    `first_steps` are the first steps that are not shared, by seed.
    """
    for run in runs:
        seed = run.options.seed
        print(f"seed {seed}, in {run.plan.run_dir}:")
        names = [step.name for step in run.plan.steps]
        if seed is not None and seed in first_steps:
            # The files that a new seed shares with the run do not exist yet.
            names = names[names.index(first_steps[seed].name) :]
        decisions = [(step, decision) for step, decision in run.decisions if step.name in names]
        _print_decisions(decisions, run.options)


def _print_decisions(decisions: Decisions, options: RunOptions) -> None:
    """Print the decision about each step, and the command of each step that is due."""
    due = 0
    for step, decision in decisions:
        verb = "run" if decision.action == "start" else decision.action
        print(f"{verb} {step.name}: {decision.reason}")
        for path in decision.replaced:
            if decision.deletes:
                print(f"    deletes {path}")
            elif decision.action == "continue":
                print(f"    moves {path} to {TRASH}, without its checkpoints")
            else:
                print(f"    moves {path} to {TRASH}")
        if decision.action != "skip":
            due += 1
            print(f"    {options.command(step)}")
    print(f"{due} of {len(decisions)} steps would run; nothing was written")
