"""One run of a recipe: check the steps that are due, run them one after the other, and say where the report is.

`fourstage run` calls two functions for each seed:

    run = check_run(recipe, options)    reads the record, decides which steps are due, and checks these; writes nothing
    code = run_steps(run, ...)          locks the run's directory, runs the steps, and pushes what was not pushed

Between them is the `CheckedRun`, so that all seeds are checked before the first one runs.
"""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_PUSH_FAILED, EXIT_WAITING, Problem, as_typed, refuse
from pipeline.files import check_directory, check_links, is_locked, lock, read_json
from pipeline.progress import time_in_words
from pipeline.runner.console import RunConsole, show_checks
from pipeline.runner.data_table import describe_data
from pipeline.runner.due import Decision, Decisions, choose_steps
from pipeline.runner.launcher import count_processes, exit_code, shards_model
from pipeline.runner.plan import Plan, Recipe
from pipeline.runner.preflight import check_steps
from pipeline.runner.processes import WarmProcess, run_command
from pipeline.runner.records import TRASH, RunRecord, clear
from pipeline.runner.run_state import RunState
from pipeline.runner.steps import Step
from pipeline.stages import SMOKE

LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class RunOptions:
    """The options of `fourstage run` for one run.

    With `--seeds`, there is a run for each seed: their options differ in `seed`, `output_dir` and `start`.

    Attributes:
        recipe: The recipe folder, as it was typed.
        resume_command: The command that resumes it, for all seeds if there are several.
        output_dir: Directory of the run. Default: the one in the YAML files.
        seed: Seed of every step. Default: the seeds in the YAML files.
        start: The first step to run, even if it has finished (`--from`). None: the first that is due.
        until: The last step to run. None: the last one of the recipe.
        force: Steps whose output is deleted, () for all from `start` on, None for none of them.
        launch_file: Launch file of accelerate.
        num_processes: Processes of each training step. Default: as in the launch file.
        launcher: Words of the command that starts training steps on all machines of a cluster.
        smoke: Whether every stage trains for two steps in miniature.
        dry_run: Whether nothing is run or written.
        plain: Whether a line is printed for each event instead of a live view.
        verbose: Whether the steps' output is printed.
    """

    recipe: Path
    resume_command: str
    launch_file: str
    output_dir: Path | None = None
    seed: int | None = None
    start: str | None = None
    until: str | None = None
    force: tuple[str, ...] | None = None
    num_processes: int | None = None
    launcher: tuple[str, ...] = ()
    smoke: bool = False
    dry_run: bool = False
    plain: bool = False
    verbose: bool = False

    @property
    def launch_arguments(self) -> list[str]:
        """The arguments of `accelerate launch` itself."""
        arguments = ["--config_file", self.launch_file]
        if self.num_processes:
            arguments += ["--num_processes", str(self.num_processes)]
        return arguments

    def command(self, step: Step) -> str:
        """Return the command of a step as a user types it."""
        return shlex.join(step.command(self.launch_arguments, self.launcher))

    def executable(self, step: Step) -> list[str]:
        """Return the words of the same command for this Python interpreter."""
        return step.executable(self.launch_arguments, self.launcher)


@dataclass(frozen=True)
class CheckedRun:
    """A run of which the due steps have been checked.

    Attributes:
        options: The options of the command.
        plan: All steps of the run.
        decisions: What to do about each step from `--from` to `--until`.
        record: The record of the run, on which the decisions are based.
        was_locked: Whether another command, or a step that outlived its command, was writing to the run when the
            record was read. The decisions are then made again before the first step runs.
    """

    options: RunOptions
    plan: Plan
    decisions: Decisions
    record: RunRecord
    was_locked: bool


def check_run(recipe: Recipe, options: RunOptions) -> CheckedRun:
    """Plan a run, decide which of its steps are due, and check these; write nothing.

    Raises:
        UserError: If a step that is due would reject its settings or inputs, or a directory cannot be written to.
    """
    plan = recipe.plan(options.output_dir, options.seed, options.smoke)
    if not options.dry_run:
        # If this directory cannot be created, neither can those in it.
        refuse(check_directory(plan.run_dir))
    _refuse_links(plan.run_dir, [])
    record = RunRecord.read(plan.run_dir)
    first_own_step = record.content.get("since")
    if first_own_step:
        # The steps before it are shared with the enclosing run, and have the seeds of that run.
        shared = recipe.plan(plan.run_dir, None, options.smoke).steps
        place = [step.name for step in shared].index(first_own_step)
        plan = replace(plan, steps=shared[:place] + plan.steps[place:])
    was_locked = is_locked(plan.run_dir / LOCK_FILE)
    decisions = choose_steps(plan.steps, record, options.start, options.until, options.force)
    _refuse_links(plan.run_dir, decisions)
    if not options.dry_run:
        outputs = [step.output for step in plan.steps]
        refuse(*map(check_directory, [*outputs, plan.run_dir / "logs"]))
    due = [step for step, decision in decisions if decision.action != "skip"]
    if due:
        refuse(*_check_due_steps(due, plan, recipe, options))
    return CheckedRun(options, plan, decisions, record, was_locked)


def _refuse_links(run_dir: Path, decisions: Decisions) -> None:
    """Raise a `UserError` if a link would make the runner, or a step that is due, write outside of the run."""
    # What earlier commands moved to the trash is not written to.
    paths = [run_dir / LOCK_FILE, run_dir / "run.json", run_dir / TRASH]
    folders = [run_dir / "logs"]
    for step, decision in decisions:
        if decision.action != "skip":
            folders += [step.output, *step.leftovers]
    refuse(*check_links(*paths, home=run_dir, inner=False), *check_links(*folders, home=run_dir))


def _check_due_steps(due: Sequence[Step], plan: Plan, recipe: Recipe, options: RunOptions) -> list[Problem]:
    """Return what the steps that are due would reject.

    The other steps are not checked, but they make the models and data that the due steps start from.
    """
    names = [step.name for step in due]
    processes = count_processes(options.num_processes, options.launch_file)
    with show_checks(options.recipe, options.plain, options.verbose):
        if not options.smoke:
            problems = check_steps(plan.steps, names, processes)
        else:
            steps = _steps_in_full(plan, recipe, options)
            problems = check_steps(steps, names, processes)
            # The real run may have more processes than the smoke run. If it can run with any of these numbers, the
            # problems are only due to the number of the smoke run.
            if problems and not all(check_steps(steps, names, number) for number in (2, 4, 8, 16, 64)):
                problems = []
    if shards_model(options.launch_file):
        remedy = "shards the model, which PPO refuses; stop before it with --until, then run it with another file"
        for step in due:
            if step.stage.has_critic:
                problems.append(Problem(f"{step.name}: --config_file", options.launch_file, remedy))
    return problems


def _steps_in_full(plan: Plan, recipe: Recipe, options: RunOptions) -> tuple[Step, ...]:
    """Return the steps of a smoke run with the settings of the real run, to find mistakes that `--smoke` would hide.

    Only trackers and pushes stay switched off, as in the smoke run.
    """
    smoke_values = {step.name: step.values for step in plan.steps}
    steps: list[Step] = []
    for step in recipe.plan(plan.run_dir, options.seed).steps:
        values = dict(step.values)
        for key in ("report_to", "push_to_hub"):
            if key in smoke_values[step.name]:
                values[key] = smoke_values[step.name][key]
        steps.append(replace(step, values=values))
    return tuple(steps)


def run_steps(run: CheckedRun, warm: WarmProcess | None, began: float) -> int:
    """Run the steps that are due, push what was not pushed, and print what the report concludes.

    Args:
        run: The checked run.
        warm: Process from which steps are forked; None to start each as a new process.
        began: Time at which the command began, by `time.monotonic`.

    Returns:
        0, the exit code of a step that failed, `EXIT_PUSH_FAILED`, or 128 + the signal that stopped the run.

    Raises:
        UserError: If another command is writing to the run's directory.
    """
    options = run.options
    plan = run.plan
    # The steps inherit the lock: if this process is killed, another run can only start once they have ended.
    with lock(plan.run_dir / LOCK_FILE, orphans_only=True) as locks:
        record = RunRecord.read(plan.run_dir)
        decisions = run.decisions
        if run.was_locked or record.content != run.record.content:
            # Something else has written to the run since the decisions were made.
            decisions = choose_steps(plan.steps, record, options.start, options.until, options.force)
            _refuse_links(plan.run_dir, decisions)
        earlier_seed = record.content.get("seed")
        record.update(recipe=str(options.recipe), seed=plan.seed, smoke=options.smoke)
        state = RunState(plan.run_dir, plan.steps, decisions, record.seconds, options.smoke)
        trash = plan.run_dir / TRASH / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
        is_replaced = any(decision.replaced for _, decision in decisions)
        if is_replaced and options.seed is not None and options.seed != earlier_seed:
            print(_describe_replacement(run, earlier_seed, trash), flush=True)
        title = _title(run)
        with contextlib.closing(RunConsole(title, state, began, options.plain, options.verbose)) as console:
            code = Session(options, record, console, trash, locks, warm, began).run(decisions)
    if trash.exists():
        print(f"earlier output was moved to {trash}; delete that when it is no longer needed")
    if options.smoke and code == 0:
        for line in describe_data(record.steps):
            print(line)
    steps = [step for step, _ in decisions]
    # A failed push comes after the report has been written.
    if code in (0, EXIT_PUSH_FAILED) and steps and steps[-1].kind == "report" and steps[-1].product.exists():
        for line in conclusion(steps[-1].product):
            print(line)
        print(f"next: {_next_commands(run, steps)}")
    return code


def _title(run: CheckedRun) -> str:
    """Return the title of the live view: "pocket, seed 1, in runs/pocket"."""
    parts = [str(run.options.recipe)]
    if run.plan.seed is not None:
        parts.append(f"seed {run.plan.seed}")
    if run.options.smoke:
        parts.append(SMOKE)
    return ", ".join([*parts, f"in {run.plan.run_dir}"])


def _describe_replacement(run: CheckedRun, earlier_seed: object, trash: Path) -> str:
    """Return a line which says that a run of another seed is replaced, and how to keep both.

    `earlier_seed` is the seed in the run's record, or None if it has none. `trash` is where its output is moved.
    """
    seed = "another seed"
    if earlier_seed is not None:
        seed = f"seed {earlier_seed}"
    fate = f"moved to {trash}"
    if run.options.force == ():
        fate = "deleted"
    separate = f"--output_dir {run.plan.run_dir / f'seed{run.options.seed}'}"
    return f"replaces the run of {seed}, which is {fate}; {separate} would keep both"


def _next_commands(run: CheckedRun, steps: Sequence[Step]) -> str:
    """Return the commands to type next: the real run after a smoke run, otherwise the page and a chat."""
    if run.options.smoke:
        return as_typed("run", run.options.recipe)
    commands = [as_typed("app", run.plan.run_dir)]
    models = [step for step in steps if step.stage.measured and step.stage.chats and step.stage.generates]
    if models:
        commands.append(as_typed("chat", models[-1].output))
    return " · ".join(commands)


def conclusion(report: Path) -> list[str]:
    """Return the lines that conclude a run, read from the `metrics.json` next to its report.

    Example:
        report: runs/pocket/report/index.html, 1 of 6 promised figures fall short
        what did not work:
          3_ppo: wins less often than its opponent
            train longer (max_steps)
    """
    summary = read_json(report.with_name("metrics.json"))
    promises = _count_promises(summary.get("promises", []), summary.get("promises_not_measured", []))
    lines = [f"report: {report}{promises}"]
    verdict = summary.get("verdict", [])
    if verdict:
        lines.append("what did not work:")
        for item in verdict:
            lines += [f"  {item['stage']}: {item['what']}", f"    {item['remedy']}"]
        lines += [f"  not judged: {line}" for line in summary.get("not_judged", [])]
    elif summary.get("conclusion"):
        lines.append(summary["conclusion"])
    return lines


def _count_promises(promises: Sequence[Mapping[str, Any]], not_measured: Sequence[object]) -> str:
    """Return how many of a recipe's promised metrics a run reaches, as the end of a line; "" if it promises none.

    Args:
        promises: The promises that were measured, each with the truth value `kept`.
        not_measured: The promises that were not measured.
    """
    broken = sum(not promise["kept"] for promise in promises)
    if broken:
        return f", {broken} of {len(promises)} promised figures fall short"
    if promises and not_measured:
        return f", {len(promises)} promises kept, {len(not_measured)} not measured"
    if promises:
        return f", all {len(promises)} promises kept"
    return ""


@dataclass
class Session:
    """The execution of one run's steps, one after the other.

    Attributes:
        options: The options of the command.
        record: The run's record, which is written before and after each step.
        console: The display of the steps.
        trash: Folder to which the earlier output of steps is moved.
        locks: File descriptors that the steps inherit, so that they hold the lock on the run as well.
        warm: Process from which steps are forked; None to start each as a new process.
        began: Time at which the command began, by `time.monotonic`.
    """

    options: RunOptions
    record: RunRecord
    console: RunConsole
    trash: Path
    locks: Sequence[int]
    warm: WarmProcess | None
    began: float

    def run(self, decisions: Decisions) -> int:
        """Run the steps that are due, then push what was not pushed. Return 0, or the exit code of the command."""
        for position, (step, decision) in enumerate(decisions, start=1):
            line = f"[{position}/{len(decisions)}] {step.name}: {decision.reason}"
            if decision.action == "skip":
                self.console.event(f"{line}, skipped")
                continue
            self.console.event(line)
            self._clear(step, decision)
            code = self._run_step(step, decision)
            if code:
                return code
        self.console.close()
        finished = len(self.console.state.taken)
        if finished:
            print(f"{finished} steps in {time_in_words(time.monotonic() - self.began)}", flush=True)
        else:
            print("nothing to do: all steps had finished", flush=True)
        return self._push_steps([step for step, _ in decisions])

    def _clear(self, step: Step, decision: Decision) -> None:
        """Move a step's earlier output and log to the trash, or delete the output if the user asked for that.

        A step that continues keeps its checkpoints and its log. What is deleted is printed here; that something was
        moved is printed once, after the last step.
        """
        if decision.deletes:
            for path in clear(decision.replaced, trash=None):
                self.console.event(f"removed {path}")
        elif decision.action == "continue":
            clear(decision.replaced, self.trash, exception="checkpoint-*")
        elif decision.replaced:
            clear([*decision.replaced, self.console.log(step)], self.trash)

    def _run_step(self, step: Step, decision: Decision) -> int:
        """Run a step and record it. Return 0 if it has finished, otherwise the exit code of the run."""
        command = self.options.command(step)
        self.console.event(f"$ {command}")
        self.record.start(step, decision.action, command)
        started = time.monotonic()
        with self.console.step(step, command, resumes=decision.action != "start") as (output, variables):
            words = self.options.executable(step)
            code, received, peak = run_command(words, os.environ | variables, self.locks, output, self.warm)
        seconds = time.monotonic() - started
        code = exit_code(code)
        # A step whose push failed is complete: it is pushed again at the end, and not trained again.
        is_complete = code in (0, EXIT_PUSH_FAILED) and step.is_complete
        self._record_step(step, seconds, code, is_complete, peak)
        if received is not None:
            stopped = f"{step.name} was stopped by {received.name}"
            remaining = f"kept: {self.console.state.describe_kept(step, code)}"
            self.console.stop(step, seconds, 0, stopped, remaining, f"to resume: {self.options.resume_command}")
            return 128 + int(received)
        if not is_complete:
            self._show_failure(step, seconds, code)
            return code or 1
        self.console.finish(step, seconds)
        if code:
            self.console.event(f"    {step.name} was not pushed to the Hub, which is tried again at the end")
        return 0

    def _record_step(self, step: Step, seconds: float, code: int, is_complete: bool, peak: int) -> None:
        """Record the end of a step, and what it reported about its data."""
        entry = self.record.steps[step.name]
        if code == 0 and step.push:
            entry["pushed"] = list(step.push)
        facts = self.console.state.progress.facts
        names = ["evaluated_on", "read"]
        if self.options.smoke:
            # Only a smoke run keeps a row of the user's data, to show it.
            names.append("first_row")
        entry.update({name: facts[name] for name in names if name in facts})
        self.record.stop(step, seconds, is_complete, peak, facts.get("lost"))

    def _show_failure(self, step: Step, seconds: float, code: int) -> None:
        """Print why a step has not finished, and how to continue from there.

        `code` is the exit code of the step, 0 if it ended without an error but also without its output.
        """
        if code == EXIT_WAITING:
            failure = self.console.state.awaited
        elif code:
            failure = f"failed with exit code {code}"
        else:
            failure = f"failed: it ended without writing {step.product}"
        message = f"{step.name} {failure}; the steps before it are kept"
        self.console.stop(step, seconds, code or 1, message, f"to continue from there: {self.options.resume_command}")

    def _push_steps(self, steps: Sequence[Step]) -> int:
        """Push the output of steps whose settings ask for it, and which is not on the Hub yet.

        Either an earlier push has failed, or the step ran before its settings asked for a push.

        Returns:
            0, `EXIT_PUSH_FAILED` if some output was not pushed, or 128 + the signal that stopped it.
        """
        result = 0
        for step in steps:
            if not step.push or self.record.steps[step.name].get("pushed") == list(step.push):
                continue
            print(f"$ {as_typed(*step.push)}", flush=True)
            # The step itself pushes with the environment and the token of its settings.
            environment = {str(name): str(value) for name, value in (step.values.get("env") or {}).items()}
            if step.values.get("hub_token"):
                environment["HF_TOKEN"] = str(step.values["hub_token"])
            words = [sys.executable, "-m", "pipeline", *step.push]
            code, received, _ = run_command(words, environment | os.environ, self.locks, warm=self.warm)
            if received is not None:
                return 128 + int(received)
            if code == 0:
                self.record.steps[step.name]["pushed"] = list(step.push)
                self.record.update()
            else:
                result = EXIT_PUSH_FAILED
        return result
