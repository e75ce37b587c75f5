"""`fourstage status RUN`: what each step of a run has done, what is out of date and why, and what is left.

    runs/mine: mine, seed 3
    1_pretrain  done        1 min 38 s
    2_sft       cut short       12 s  saved up to step 120 of 400, about 28 s
    report      not run yet           about 6.0 s
    1 of 3 steps are done; the rest takes about 34 s: fourstage run mine --output_dir runs/mine

It compares the record of the run with the current recipe folder, and writes nothing.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.weight_fields import newest_state, number_of
from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import describe_folder, is_locked
from pipeline.progress import time_in_words
from pipeline.runner.due import Decision, decide
from pipeline.runner.plan import read_plan
from pipeline.runner.records import RunRecord
from pipeline.runner.session import LOCK_FILE
from pipeline.runner.steps import Step
from pipeline.stages import SMOKE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or of the runs of several seeds")


def main(args: argparse.Namespace) -> int:
    """Print the state of each step of the run or, for several seeds, of each run. Return 0."""
    runs = [path.parent for path in args.run.glob("seed*/run.json")]
    if (args.run / "run.json").exists():
        runs = [args.run]
    if not runs:
        remedy = describe_folder(args.run) or f"does not contain a run; make it with `{as_typed('run', 'RECIPE')}`"
        raise UserError(Problem("RUN", args.run, remedy))
    for run in sorted(runs):
        _print_status(run)
    return 0


def _print_status(run: Path) -> None:
    """Print a line for each step of a run, and the command that runs what is left."""
    record = RunRecord.read(run)
    recipe = Path(str(record.content.get("recipe")))
    smoke = bool(record.content.get("smoke"))
    seed = record.content.get("seed")
    # The seed in the record may also be the first one in the YAML files, which other steps need not have.
    is_seeded = any("--seed" in str(entry.get("command")).split() for entry in record.steps.values())
    planned_seed = None
    if is_seeded:
        planned_seed = seed
    steps = read_plan(recipe, run, planned_seed, smoke).steps
    if not any(step.kind == "evaluate" for step in steps):
        # Without an evaluation, there is nothing to report.
        steps = steps[:-1]
    decisions = decide(steps, record)

    title = f"{run}: {recipe}"
    if seed is not None:
        title += f", seed {seed}"
    if smoke:
        title += f" ({SMOKE})"
    print(title)
    expected = _expected_seconds(steps, record)
    is_running = is_locked(run / LOCK_FILE)
    width = max(len(step.name) for step in steps)
    due = 0
    seconds_left = 0.0
    for step in steps:
        decision = decisions[step.name]
        entry = record.steps.get(step.name, {})
        state = _state(step, decision, entry, is_running)
        time_taken = ""
        if entry.get("seconds"):
            time_taken = time_in_words(entry["seconds"])
        notes: list[str] = []
        # The state says as much as these reasons.
        if decision.reason not in ("finished", "has not run yet", "was interrupted"):
            notes.append(decision.reason)
        if decision.action != "skip":
            due += 1
            saved = _saved_progress(step, decision, entry)
            if saved.all_steps:
                notes.append(f"saved up to step {saved.steps} of {saved.all_steps}")
            seconds = saved.remaining_share * expected[step.name]
            seconds_left += seconds
            if seconds:
                notes.append(f"about {time_in_words(seconds)}")
        print(f"{step.name:{width}}  {state:11}  {time_taken:>8}  {'; '.join(notes)}".rstrip())

    if not due:
        print("all steps are done")
        return
    words: list[object] = ["run", recipe]
    if is_seeded:
        words += ["--seed", seed]
    words += ["--output_dir", run]
    if smoke:
        words.append("--smoke")
    rest = f"the rest takes about {time_in_words(seconds_left)}: {as_typed(*words)}"
    print(f"{len(steps) - due} of {len(steps)} steps are done; {rest}")


def _expected_seconds(steps: Sequence[Step], record: RunRecord) -> dict[str, float]:
    """Return the seconds that each step is expected to take, by its name.

    A step that has finished takes as long as then. Any other takes its time in recipes/pocket, scaled by how much
    longer the finished steps of this run took than the same kinds of steps in recipes/pocket.
    """
    measured = record.seconds
    finished = [step for step in steps if step.name in measured]
    slowdown = 1.0
    if finished:
        slowdown = sum(measured[step.name] for step in finished) / sum(step.stage.seconds for step in finished)
    expected: dict[str, float] = {}
    for step in steps:
        if step.name in measured:
            expected[step.name] = measured[step.name]
        elif step.kind == "report":
            # The time of a report does not depend on the size of the models.
            expected[step.name] = step.stage.seconds
        else:
            expected[step.name] = slowdown * step.stage.seconds
    return expected


def _state(step: Step, decision: Decision, entry: Mapping[str, Any], is_running: bool) -> str:
    """Return the state of a step with this entry in the record, in one or two words."""
    if decision.action == "skip":
        return "done"
    if not entry:
        return "not run yet"
    if entry.get("finished_at"):
        return "out of date"
    if is_running:
        return "running"
    if step.stage.by_people:
        return "waiting"
    return "cut short"


class SavedProgress(NamedTuple):
    """How far a step has trained according to its last checkpoint.

    Attributes:
        steps: Training steps up to the checkpoint; 0 without one.
        all_steps: Training steps of the whole training when it was saved; 0 without a checkpoint.
        remaining_share: Training steps that are left, divided by `all_steps`. It is more than 1 if `max_steps` was
            more than doubled since, and 1 without a checkpoint.
    """

    steps: float = 0
    all_steps: float = 0
    remaining_share: float = 1.0


def _saved_progress(step: Step, decision: Decision, entry: Mapping[str, Any]) -> SavedProgress:
    """Return how far a step has trained that resumes or continues; any other starts from the beginning.

    `entry` is its entry in the record of the run, empty if it has not run yet.
    """
    if not entry or decision.action not in ("resume", "continue"):
        return SavedProgress()
    state = newest_state(step.output)
    steps = number_of(state, "global_step")
    all_steps = number_of(state, "max_steps")
    if not all_steps:
        return SavedProgress()
    total = all_steps
    if decision.action == "continue":
        total = number_of(step.values, "max_steps")
    return SavedProgress(steps, all_steps, max(total / all_steps - steps / all_steps, 0.0))
