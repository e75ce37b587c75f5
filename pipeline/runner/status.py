"""`fourstage status RUN`: what each step of a run has done, what is out of date and why, and what is left.

It writes nothing, and compares with the current recipe folder.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    # The record has a seed as well if it is the YAML files' own.
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
        if decision.reason not in ("finished", "has not run yet", "was interrupted"):
            notes.append(decision.reason)
        if decision.action != "skip":
            due += 1
            saved_steps, all_steps, remaining_share = _saved(step, decision, entry)
            if all_steps:
                notes.append(f"saved up to step {saved_steps} of {all_steps}")
            seconds = remaining_share * expected[step.name]
            seconds_left += seconds
            if seconds:
                notes.append(f"about {time_in_words(seconds)}")
        print(f"{step.name:{width}}  {state:11}  {time_taken:>8}  {'; '.join(notes)}".rstrip())

    if not due:
        print("all steps are done")
        return
    words: list[object] = ["run", recipe, "--output_dir", run]
    if is_seeded:
        words[2:2] = ["--seed", seed]
    if smoke:
        words.append("--smoke")
    rest = f"the rest takes about {time_in_words(seconds_left)}: {as_typed(*words)}"
    print(f"{len(steps) - due} of {len(steps)} steps are done; {rest}")


def _expected_seconds(steps: Sequence[Step], record: RunRecord) -> dict[str, float]:
    """Return the seconds that each step takes: as before, or its time in recipes/pocket, scaled to this machine."""
    measured = record.seconds
    usual = sum(step.stage.seconds for step in steps if step.name in measured)
    speed = 1.0
    if usual:
        speed = sum(measured[step.name] for step in steps if step.name in measured) / usual
    expected: dict[str, float] = {}
    for step in steps:
        expected[step.name] = step.stage.seconds
        # The time of a report does not depend on the other steps.
        if step.kind != "report":
            expected[step.name] *= speed
    # Not the steps that are no longer part of the recipe.
    expected.update({name: seconds for name, seconds in measured.items() if name in expected})
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


def _saved(step: Step, decision: Decision, entry: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return how far a step that resumes was saved: its last saved step, its number of steps, and the share to go.

    Both numbers are 0 if nothing was saved. If max_steps was raised, the rest may take longer than before.
    """
    if not entry or decision.action not in ("resume", "continue"):
        return 0, 0, 1.0
    saved = newest_state(step.output)
    saved_steps = number_of(saved, "global_step")
    earlier_steps = number_of(saved, "max_steps")
    if not earlier_steps:
        return saved_steps, 0, 1.0
    total = earlier_steps
    if decision.action == "continue":
        total = number_of(step.values, "max_steps")
    return saved_steps, earlier_steps, max(total / earlier_steps - saved_steps / earlier_steps, 0.0)
