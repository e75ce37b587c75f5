"""`python -m pipeline status RUN`: what each step of a run has done, what is out of date and why, and what is left.

    python -m pipeline status runs/pocket

Writes nothing, and looks at the recipe folder as it is now.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from pipeline.config.effects import newest_state, number_of
from pipeline.errors import Problem, UserError
from pipeline.files import is_locked
from pipeline.progress import duration
from pipeline.runner.plan import read_plan
from pipeline.runner.records import Decision, RunRecord, decide, measured_seconds
from pipeline.runner.steps import Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `status` to `parser`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run, or of the runs of several seeds")


def main(args: argparse.Namespace) -> int:
    """Print the state of each step of the run or, for several seeds, of each of their runs. Return 0.

    Raises:
        UserError: If there is no run, its record is damaged, or its recipe folder cannot be read.
    """
    runs = [args.run] if (args.run / "run.json").exists() else [path.parent for path in args.run.glob("seed*/run.json")]
    if not runs:
        raise UserError(Problem("RUN", args.run, "does not contain a run; make it with `python -m pipeline run`"))
    for run in sorted(runs):
        show(run)
    return 0


def show(run: Path) -> None:
    """Print the state of each step of one run, and the command that does what is left."""
    record = RunRecord.read(run)
    recipe, smoke = Path(str(record.content.get("recipe"))), bool(record.content.get("smoke"))
    asked = any("--seed" in str(entry.get("command")).split() for entry in record.steps.values())
    seed = record.content.get("seed") if asked else None
    steps = read_plan(recipe, run, seed, smoke).steps
    if not any(step.kind == "evaluate" for step in steps):  # there is nothing to report then
        steps = steps[:-1]
    decisions = decide(steps, record)
    full = _expected_seconds(steps, measured_seconds(run, str(recipe), smoke))
    is_running = is_locked(run / "run.lock")
    print(f"{run}: {recipe}" + (f", seed {shown}" if (shown := record.content.get("seed")) is not None else ""))
    left, done = 0.0, 0
    width = max(len(step.name) for step in steps)
    for step in steps:
        decision, entry = decisions[step.name], record.steps.get(step.name, {})
        share = _share_left(step, decision, is_begun=bool(entry))
        seconds = share * full[step.name]
        left, done = left + seconds, done + (decision.action == "skip")
        state = _state(step, decision, record, is_running)
        took = duration(entry["seconds"]) if entry.get("seconds") else ""
        reason = "" if decision.reason in ("finished", "has not run yet", "was interrupted") else decision.reason
        notes = [reason, _progress(step, decision), f"about {duration(seconds)}" if seconds else ""]
        print(f"{step.name:{width}}  {state:11}  {took:>8}  {'; '.join(filter(None, notes))}".rstrip())
    command = ["python", "-m", "pipeline", "run", str(recipe), *(["--seed", str(seed)] if asked else [])]
    command += ["--output_dir", str(run), *(["--smoke"] if smoke else [])]
    if done == len(steps):
        print("all steps are done")
    else:
        print(f"{done} of {len(steps)} steps are done; the rest takes about {duration(left)}: {shlex.join(command)}")


def _state(step: Step, decision: Decision, record: RunRecord, is_running: bool) -> str:
    """Return a step's state in two or three words."""
    if decision.action == "skip":
        return "done"
    if step.name not in record.steps:
        return "not run yet"
    if record.is_finished(step.name):
        return "out of date"
    return "running" if is_running else "waiting" if step.stage.by_people else "cut short"


def _expected_seconds(steps: tuple[Step, ...], measured: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds that each step takes from its beginning: what it took or, failing that, in proportion."""
    usual = sum(step.stage.seconds for step in steps if step.name in measured)
    speed = sum(measured[step.name] for step in steps if step.name in measured) / usual if usual else 1.0
    return {step.name: measured.get(step.name, speed * step.stage.seconds) for step in steps}


def _share_left(step: Step, decision: Decision, is_begun: bool) -> float:
    """Return the share of a step that is still to be done; for one that gets more steps, relative to those before."""
    if decision.action in ("skip", "start") or not is_begun:
        return float(decision.action != "skip")
    state = newest_state(step.output)
    done, before = number_of(state, "global_step"), number_of(state, "max_steps")
    total = number_of(step.values, "max_steps") if decision.action == "continue" else before
    return (max(total, done) - done) / before if before else 1.0


def _progress(step: Step, decision: Decision) -> str:
    """Return how far training has been saved, if it goes on from there."""
    state = newest_state(step.output) if decision.action in ("resume", "continue") else {}
    return f"saved up to step {state['global_step']} of {state['max_steps']}" if state.get("max_steps") else ""
