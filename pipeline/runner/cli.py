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
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.recipe_folder import LAUNCH_FILE, is_fetched, show_fetched
from pipeline.errors import EXIT_PUSH_FAILED, EXIT_WAITING, Problem, UserError, as_typed, collect, refuse
from pipeline.files import as_list, check_directory, lock, read_json
from pipeline.progress import time_in_words
from pipeline.runner.console import RunConsole, is_live, show_checks
from pipeline.runner.data_table import describe_data
from pipeline.runner.due import Decision, decide
from pipeline.runner.launcher import check_launch_file, count_processes, exit_code, launch_file, shards
from pipeline.runner.preflight import check_steps
from pipeline.runner.processes import WarmProcess, run
from pipeline.runner.recipe import Plan, check_of_recipe, read_plan
from pipeline.runner.records import TRASH, RunRecord, clear, share_steps
from pipeline.runner.run_state import RunState
from pipeline.runner.steps import REPORT, Step, find_step
from pipeline.stages import SMOKE

Decided = list[tuple[Step, Decision]]
"""Steps, and the decision about each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", type=Path, help="folder of YAML files, here or on the Hub (NAME/repo), or pocket")
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
    args.began = time.monotonic()
    problems: list[Problem | None] = []
    with show_checks(args):
        if args.num_processes is not None and args.num_processes < 1:
            problems.append(Problem("--num_processes", args.num_processes, "must be at least 1"))
        problems.append(check_launch_file(launch_file(args), named=args.config_file is not None))
        if args.output_dir is None and is_fetched(args.recipe):
            problems.append(check_of_recipe(read_plan(args.recipe, smoke=args.smoke).run_dir, args.recipe))
        option, seeds = ("--seed", [args.seed or 0]) if args.seeds is None else ("--seeds", args.seeds)
        for seed in seeds:
            if not 0 <= seed < 2**32:
                problems.append(Problem(option, seed, f"must be between 0 and {2**32 - 1}"))
            elif seeds.count(seed) > 1:
                problems.append(Problem(option, seed, "is repeated; name each seed once"))
    refuse(*problems)
    print(show_fetched(args.recipe), end="")

    # The command that resumes, for all seeds if there are several; --from and --force would repeat finished steps.
    words = ["run", str(args.recipe)]
    for name in ("until", "seed", "seeds", "output_dir", "num_processes", "config_file", "launcher"):
        if (value := getattr(args, name)) not in (None, ""):
            words += [f"--{name}", *map(str, as_list(value))]
    args.resume = as_typed(*words, *(["--smoke"] if args.smoke else []))
    # The arguments of `accelerate launch` itself, and the command that starts it on several machines.
    args.launch = ["--config_file", launch_file(args)]
    args.launch += ["--num_processes", str(args.num_processes)] if args.num_processes else []
    args.launcher = shlex.split(args.launcher)
    alone = args.num_processes in (None, 1) and not args.launcher
    forks = sys.platform == "linux" and alone and not (args.no_fork or args.dry_run or args.download)
    # The warm process imports the libraries while this one checks the steps.
    with WarmProcess(os.environ) if forks else contextlib.nullcontext() as args.warm:
        if args.seeds is not None:
            return _run_seeds(args)
        plan, decided = _prepare(args)
        if args.dry_run:
            _show(decided, args)
            return 0
        if args.download:
            # Importing it takes seconds.
            from pipeline.hub.download import download

            return download([step.values for step in plan.steps], read_plan(args.recipe).run_dir)
        return _run(plan, args)


def _run_seeds(args: argparse.Namespace) -> int:
    """Run the steps of each seed and the report over them, or print them for `--dry-run`. Return the exit code."""
    whole = read_plan(args.recipe, args.output_dir, smoke=args.smoke)
    run_dir = whole.run_dir
    # With --from, the runs of new seeds share the steps before it with the run itself, which must be able to continue
    # from there. The run's own seed shares everything but the report, which is about a single run.
    since: dict[int, Step] = {}
    if args.start is not None:
        first = find_step(whole.steps, args.start, "--from")
        new = [seed for seed in args.seeds if not (run_dir / f"seed{seed}" / "run.json").exists()]
        since = {seed: whole.steps[-1] if seed == whole.seed else first for seed in new}
    if since and not args.dry_run:
        _prepare(argparse.Namespace(**vars(args) | {"seeds": None, "output_dir": run_dir}))
        for seed, step in since.items():
            share_steps(whole.steps[: whole.steps.index(step)], run_dir, run_dir / f"seed{seed}", step.name)

    # Every seed is checked before the first one runs.
    problems: list[Problem] = []
    runs = []
    for seed in args.seeds:
        own = argparse.Namespace(**vars(args) | {"seed": seed, "output_dir": run_dir / f"seed{seed}"})
        # In a new run, nothing is repeated: it lacks these steps, or shares them with RUN.
        own.start = None if seed in since else args.start
        with collect(problems):
            runs.append((own, *_prepare(own)))
    refuse(*problems)
    report = Step(REPORT, "report", ("report", str(run_dir), "--seeds", *map(str, args.seeds)), run_dir / "report")
    command = shlex.join(report.command(()))
    is_reported = all(decided[-1][0].kind == "report" for _, _, decided in runs)
    if args.dry_run:
        for own, plan, decided in runs:
            print(f"seed {own.seed}, in {plan.run_dir}:")
            # The files that a new seed shares with the run do not exist yet.
            names = [step.name for step in plan.steps]
            own_steps = names[names.index(since[own.seed].name) :] if own.seed in since else names
            _show([(step, decision) for step, decision in decided if step.name in own_steps], own)
        if is_reported:
            print(f"run the report over the seeds\n    {command}")
        return 0
    with lock(run_dir / "run.lock", orphans_only=True) as descriptors:
        for own, plan, _ in runs:
            if not is_live(args):
                print(f"seed {own.seed}, in {plan.run_dir}:")
            if code := _run(plan, own):
                print(f"seed {own.seed} ended with exit code {code}; the others were not run")
                return code
        if not is_reported:
            return 0
        print(f"$ {command}")
        code, received, _ = run(report.executable(()), os.environ, descriptors, warm=args.warm)
        return 128 + int(received) if received is not None else exit_code(code)


def _prepare(args: argparse.Namespace) -> tuple[Plan, Decided]:
    """Read the plan of a run and decide about its steps. Raise a `UserError` for what a due step would refuse."""
    plan = read_plan(args.recipe, args.output_dir, args.seed, args.smoke)
    written = [*(step.output for step in plan.steps), plan.run_dir / "logs"]
    # If this directory cannot be created, neither can those in it.
    for folders in ([plan.run_dir], written) if not args.dry_run else ():
        refuse(*map(check_directory, folders))
    record = RunRecord.read(plan.run_dir)
    if since := record.content.get("since"):
        shared = read_plan(args.recipe, args.output_dir, None, args.smoke).steps
        first = [step.name for step in shared].index(since)
        plan = replace(plan, steps=shared[:first] + plan.steps[first:])
    decided = _decide(plan, record, args)
    due = [step for step, decision in decided if decision.action != "skip"]
    if not due:
        return plan, decided
    names, steps, processes = [step.name for step in due], plan.steps, count_processes(args)
    with show_checks(args):
        if args.smoke:
            # Check the recipe's settings, whose mistakes a smoke run's would hide, but without trackers and pushes.
            unset = ("report_to", "push_to_hub")
            quiet = {step.name: {key: step.values[key] for key in unset if key in step.values} for step in steps}
            whole = read_plan(args.recipe, plan.run_dir, args.seed).steps
            steps = tuple(replace(step, values={**step.values, **quiet[step.name]}) for step in whole)
        problems = check_steps(steps, names, processes)
        # A smoke run may have fewer processes than the real run.
        if problems and args.smoke and not all(check_steps(steps, names, number) for number in (2, 4, 8, 16, 64)):
            problems = []
    if shards(file := launch_file(args)):
        remedy = "shards the model, which PPO refuses; stop before it with --until, then run it with another file"
        sharded = [step for step in due if step.stage.has_critic]
        problems += [Problem(f"{step.name}: --config_file", file, remedy) for step in sharded]
    refuse(*problems)
    return plan, decided


def _show(decided: Decided, args: argparse.Namespace) -> None:
    """Print the decision about each step, and the command of each step that is due."""
    for step, decision in decided:
        print(f"{'run' if decision.action == 'start' else decision.action} {step.name}: {decision.reason}")
        for path in decision.replaced:
            kept = ", without its checkpoints" if decision.action == "continue" else ""
            print(f"    deletes {path}" if decision.deletes else f"    moves {path} to {TRASH}{kept}")
        if decision.action != "skip":
            print(f"    {shlex.join(step.command(args.launch, args.launcher))}")
    due = sum(decision.action != "skip" for _, decision in decided)
    print(f"{due} of {len(decided)} steps would run; nothing was written")


def _run(plan: Plan, args: argparse.Namespace) -> int:
    """Run the steps that are due. Return the exit code."""
    # The steps inherit the lock: if this process is killed, another run can only start once they have ended.
    with lock(plan.run_dir / "run.lock", orphans_only=True) as descriptors:
        record = RunRecord.read(plan.run_dir)
        earlier = record.content.get("seed")
        record.update(recipe=str(args.recipe), seed=plan.seed, smoke=args.smoke)
        todo = _decide(plan, record, args)
        seed = "" if plan.seed is None else f", seed {plan.seed}"
        state = RunState(plan.run_dir, plan.steps, todo, record.seconds, args.smoke)
        replaced = plan.run_dir / TRASH / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
        if args.seed not in (None, earlier) and any(decision.replaced for _, decision in todo):
            other = "another seed" if earlier is None else f"seed {earlier}"
            fate = "deleted" if args.force == [] else f"moved to {replaced}"
            apart = f"--output_dir {plan.run_dir / f'seed{args.seed}'}"
            print(f"replaces the run of {other}, which is {fate}; {apart} would keep both", flush=True)
        title = f"{args.recipe}{seed}{f', {SMOKE}' if args.smoke else ''}, in {plan.run_dir}"
        with contextlib.closing(RunConsole(title, state, args)) as console:
            code = _run_all(todo, record, replaced, console, args, descriptors)
    if replaced.exists():
        print(f"earlier output was moved to {replaced}; delete that when it is no longer needed")
    if args.smoke and code == 0:
        for line in describe_data(record.steps):
            print(line)
    report = next((step.product for step, _ in todo if step.kind == "report"), None)
    if code in (0, EXIT_PUSH_FAILED) and report is not None and report.exists():
        # Next steps for a finished run: look at it, and talk with its model.
        models = [step for step, _ in todo if step.stage.measured and step.stage.chats and step.stage.generates]
        after = [as_typed("app", plan.run_dir), *(as_typed("chat", step.output) for step in models[-1:])]
        print(*conclusion(report), sep="\n")
        print(f"next: {as_typed('run', args.recipe) if args.smoke else ' · '.join(after)}")
    return code


def conclusion(report: Path) -> list[str]:
    """Return where the report is, how many targets were met, what did not work and what to do about it."""
    summary = read_json(report.with_name("metrics.json"))
    promises, missing = summary.get("promises", []), len(summary.get("promises_not_measured", []))
    kept = f", all {len(promises)} promises kept" if promises else ""
    if promises and missing:
        kept = f", {len(promises)} promises kept, {missing} not measured"
    if broken := sum(not promise["kept"] for promise in promises):
        kept = f", {broken} of {len(promises)} promised figures fall short"
    lines = [f"  {item['stage']}: {item['what']}\n    {item['remedy']}" for item in summary.get("verdict", [])]
    lines += [f"  not judged: {line}" for line in summary.get("not_judged", []) if lines]
    reached = ["what did not work:", *lines] if lines else list(filter(None, [summary.get("conclusion")]))
    return [f"report: {report}{kept}", *reached]


def _decide(plan: Plan, record: RunRecord, args: argparse.Namespace) -> Decided:
    """Decide about each step between `--from` and `--until`. Their inputs must exist and be up to date."""
    steps = plan.steps
    first = 0 if args.start is None else steps.index(find_step(steps, args.start, "--from"))
    last = len(steps) - 1
    if args.until is not None:
        last = steps.index(find_step(steps, args.until, "--until"))
        # `--until` a stage includes its evaluation.
        last += any(step.name == f"evaluate_{steps[last].output.name}" for step in steps[last + 1 : last + 2])
    if first > last:
        raise UserError(Problem("--from", args.start, f"comes after --until {args.until}"))
    chosen = steps[first : last + 1]

    # `--force` without names means every step from `--from` on.
    from_start = {step.name for step in steps[first:]}
    forced = from_start if args.force == [] else {find_step(steps, name, "--force").name for name in args.force or ()}
    decisions = decide(steps, record, from_start if args.start is not None else (), forced)
    needed = {name for step in chosen for name in step.needs if step.kind not in ("evaluate", "report")}
    due = [step.name for step in steps[:first] if step.name in needed and decisions[step.name].action != "skip"]
    if due:
        remedy = "is needed first ({}); start there, or omit --from"
        raise UserError(*(Problem("--from", name, remedy.format(decisions[name].reason)) for name in due))

    # The report follows any other step, even with --until, as soon as one stage is measured.
    report = steps[-1]
    decided = [(step, decisions[step.name]) for step in chosen if step is not report]
    if any(step.kind == "evaluate" and (step in chosen or record.is_finished(step.name)) for step in steps):
        again = {REPORT} if REPORT in forced or any(one.action != "skip" for _, one in decided) else ()
        decided.append((report, decide([report], record, again)[REPORT]))
    elif chosen == (report,):
        raise UserError(Problem("--from", args.start, "no stage has been evaluated yet; start at an earlier step"))
    return decided


def _run_all(
    todo: Decided, record: RunRecord, trash: Path, console: RunConsole, args: argparse.Namespace, locks: Sequence[int]
) -> int:
    """Run the steps of `todo` that are due, and push them. Return the exit code."""
    for position, (step, decision) in enumerate(todo, start=1):
        skipped = ", skipped" if decision.action == "skip" else ""
        console.event(f"[{position}/{len(todo)}] {step.name}: {decision.reason}{skipped}")
        if skipped:
            continue
        kept = "checkpoint-*" if decision.action == "continue" else ""
        log = [console.log(step)] if decision.replaced and not decision.deletes and not kept else []
        # What was moved is said once, at the end.
        for path in clear([*decision.replaced, *log], None if decision.deletes else trash, kept):
            if decision.deletes:
                console.event(f"removed {path}")
        command = shlex.join(step.command(args.launch, args.launcher))
        console.event(f"$ {command}")
        record.start(step, decision.action, command)
        started = time.monotonic()
        with console.step(step, command, resumes=decision.action != "start") as (output, variables):
            executable = step.executable(args.launch, args.launcher)
            code, received, peak = run(executable, os.environ | variables, locks, output, args.warm)
        seconds, code = time.monotonic() - started, exit_code(code)
        # A step whose push failed is complete: it is pushed again at the end, and not trained again.
        complete = code in (0, EXIT_PUSH_FAILED) and step.is_complete
        record.steps[step.name] |= {"pushed": list(step.push)} if code == 0 and step.push else {}
        facts = console.state.progress.facts
        # Only a smoke run keeps a row of the user's data, to show it.
        kept_facts = ("evaluated_on", "read", "first_row") if args.smoke else ("evaluated_on", "read")
        record.steps[step.name] |= {name: facts[name] for name in kept_facts if name in facts}
        record.stop(step, seconds, complete, peak, facts.get("lost"))
        if received is not None:
            kept = f"{step.name} was stopped by {received.name}\nkept: {console.state.kept(step, code)}"
            console.stop(step, seconds, 0, kept, f"to resume: {args.resume}")
            return 128 + int(received)
        if not complete:
            failed = f"failed with exit code {code}" if code else f"failed: it ended without writing {step.product}"
            failed = console.state.awaited if code == EXIT_WAITING else failed
            kept = f"{step.name} {failed}; the steps before it are kept"
            console.stop(step, seconds, code or 1, kept, f"to continue from there: {args.resume}")
            return code or 1
        console.finish(step, seconds)
        if code:
            console.event(f"    {step.name} was not pushed to the Hub, which is tried again at the end")
    console.close()
    taken = f"{len(console.state.taken)} steps in {time_in_words(time.monotonic() - args.began)}"
    print(taken if console.state.taken else "nothing to do: all steps had finished", flush=True)

    # Push what failed to be pushed before, or was trained before its settings asked for a push.
    result = 0
    for step in (step for step, _ in todo if step.push and record.steps[step.name].get("pushed") != list(step.push)):
        print(f"$ {as_typed(*step.push)}", flush=True)
        # The step itself was given this environment and this token.
        own = {str(name): str(value) for name, value in (step.values.get("env") or {}).items()}
        own |= {"HF_TOKEN": str(step.values["hub_token"])} if step.values.get("hub_token") else {}
        code, received, _ = run([sys.executable, "-m", "pipeline", *step.push], own | os.environ, locks, warm=args.warm)
        if received is not None:
            return 128 + int(received)
        if code == 0:
            record.steps[step.name]["pushed"] = list(step.push)
            record.update()
        result = EXIT_PUSH_FAILED if code else result
    return result
