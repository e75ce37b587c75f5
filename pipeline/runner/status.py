"""`fourstage status RUN`: what each step of a run has done, what is out of date and why, and what is left.

It writes nothing, and compares with the current recipe folder.
"""

import argparse
from pathlib import Path

from pipeline.config.weight_fields import newest_state, number_of
from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import describe_folder, is_locked
from pipeline.progress import time_in_words
from pipeline.runner.due import decide
from pipeline.runner.recipe import read_plan
from pipeline.runner.records import RunRecord
from pipeline.stages import SMOKE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or of the runs of several seeds")


def main(args: argparse.Namespace) -> int:
    """Print the state of each step of the run or, for several seeds, of each run. Return 0."""
    runs = [args.run] if (args.run / "run.json").exists() else [path.parent for path in args.run.glob("seed*/run.json")]
    if not runs:
        remedy = describe_folder(args.run) or f"does not contain a run; make it with `{as_typed('run', 'RECIPE')}`"
        raise UserError(Problem("RUN", args.run, remedy))
    for run in sorted(runs):
        record = RunRecord.read(run)
        recipe, smoke = Path(str(record.content.get("recipe"))), bool(record.content.get("smoke"))
        asked = any("--seed" in str(entry.get("command")).split() for entry in record.steps.values())
        seed = record.content.get("seed")
        steps = read_plan(recipe, run, seed if asked else None, smoke).steps
        if not any(step.kind == "evaluate" for step in steps):
            # Without an evaluation, there is nothing to report.
            steps = steps[:-1]
        decisions = decide(steps, record)

        # A step takes as long as before. New steps take their time in recipes/pocket, scaled to this machine.
        measured = record.seconds
        usual = sum(step.stage.seconds for step in steps if step.name in measured)
        speed = sum(measured[step.name] for step in steps if step.name in measured) / usual if usual else 1.0
        print(f"{run}: {recipe}{'' if seed is None else f', seed {seed}'}{f' ({SMOKE})' if smoke else ''}")
        left, is_running, width = 0.0, is_locked(run / "run.lock"), max(len(step.name) for step in steps)
        for step in steps:
            decision, entry = decisions[step.name], record.steps.get(step.name, {})
            # How far a step that goes on was saved. If max_steps was raised, the rest may take longer than before.
            saved = newest_state(step.output) if entry and decision.action in ("resume", "continue") else {}
            steps_done, steps_before = number_of(saved, "global_step"), number_of(saved, "max_steps")
            steps_now = number_of(step.values, "max_steps") if decision.action == "continue" else steps_before
            share = max(steps_now / steps_before - steps_done / steps_before, 0.0) if steps_before else 1.0
            # The time of a report does not depend on the other steps.
            usual = step.stage.seconds * (1.0 if step.kind == "report" else speed)
            seconds = share * measured.get(step.name, usual) if decision.action != "skip" else 0.0
            left += seconds
            if decision.action == "skip":
                state = "done"
            elif not entry:
                state = "not run yet"
            elif record.is_finished(step.name):
                state = "out of date"
            elif is_running:
                state = "running"
            else:
                state = "waiting" if step.stage.by_people else "cut short"
            took = time_in_words(entry["seconds"]) if entry.get("seconds") else ""
            reason = "" if decision.reason in ("finished", "has not run yet", "was interrupted") else decision.reason
            so_far = f"saved up to step {steps_done} of {steps_before}" if steps_before else ""
            notes = filter(None, [reason, so_far, f"about {time_in_words(seconds)}" if seconds else ""])
            print(f"{step.name:{width}}  {state:11}  {took:>8}  {'; '.join(notes)}".rstrip())

        flags = [*(["--seed", seed] if asked else []), "--output_dir", run, *(["--smoke"] if smoke else [])]
        due = sum(decision.action != "skip" for decision in decisions.values())
        rest = f"the rest takes about {time_in_words(left)}: {as_typed('run', recipe, *flags)}"
        print(f"{len(steps) - due} of {len(steps)} steps are done; {rest}" if due else "all steps are done")
    return 0
