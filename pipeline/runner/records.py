"""The record of what a run has done (`run.json`), and which of its steps are due."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.config.effects import continues, newest_state, number_of
from pipeline.config.machine import describe_machine
from pipeline.errors import Problem, UserError
from pipeline.files import check_regular, write_text
from pipeline.runner.changes import Changes, fingerprint_path, recorded_values
from pipeline.runner.steps import Step

MOST_NAMED = 4
"""Steps that a reason names at most."""

CENTURY = 3.2e9
"""Seconds; no step takes longer."""


@dataclass(frozen=True)
class Decision:
    """A decision about a step.

    Attributes:
        action: "skip" it, "start" it from the beginning, "resume" it from what it has saved, or "continue" it from its
            last checkpoint with more steps.
        reason: Why, as a phrase.
        replaced: What it wrote before and will write again; a step that continues keeps its checkpoints.
        deletes: Whether that is deleted instead of moved to the trash.
    """

    action: Literal["skip", "start", "resume", "continue"]
    reason: str
    replaced: tuple[Path, ...] = ()
    deletes: bool = False


@dataclass
class RunRecord:
    """The content of a run's `run.json`.

    Its `steps` map the name of each step that was started to an entry with:

    - `id`, which changes whenever the step starts from the beginning or continues; `values`, its settings
    - `inputs`, the `id` of each step that it was made from; `data` and `files`, fingerprints of what it was made from
    - `command`; `hardware`, `versions` and `commit` of the machine that ran it; if it was resumed, of its last part
    - `seconds`, over all its parts; `started_at`; `finished_at`, null until it has finished
    - `pushed`, the arguments of `python -m pipeline` by which it was pushed to the Hub, if it was
    """

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Return the record of the run in `run_dir`, empty if the run has not been started.

        Raises:
            UserError: If `run.json` is damaged.
        """
        path = run_dir / "run.json"
        try:
            if path.exists():
                check_regular(path)
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(Problem("output_dir", path, f"cannot be read ({error}); remove it")) from error
        steps = content.get("steps", {}) if isinstance(content, dict) else None
        if not isinstance(steps, dict) or not all(map(_is_entry, steps.values())):
            raise UserError(Problem("output_dir", path, "is not the record of a run; remove it"))
        return cls(path, content)

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """The entry of each step that was started, by name."""
        steps: dict[str, dict[str, Any]] = self.content.setdefault("steps", {})
        return steps

    def is_finished(self, name: str) -> bool:
        """Return whether the step has finished."""
        return bool(self.steps.get(name, {}).get("finished_at"))

    def inputs(self, step: Step) -> dict[str, str]:
        """Return the `id` of each finished step that `step` needs."""
        return {need: self.steps[need]["id"] for need in step.needs if self.is_finished(need)}

    def update(self, **facts: Any) -> None:
        """Record facts about the whole run."""
        self.content.update(facts)
        self._write()

    def start(self, step: Step, decision: Decision, command: str) -> None:
        """Record that a step starts, resumes or continues, with `command` as typed in a shell."""
        before = {} if decision.action == "start" else self.steps.get(step.name, {})
        kept = before.get("id") if decision.action == "resume" else None
        self.steps[step.name] = {
            "id": kept or secrets.token_hex(8),
            "values": recorded_values(step),
            "inputs": self.inputs(step),
            "data": _fingerprints(step.data),
            "files": _fingerprints({str(path): path for path in step.files}),
            "command": command,
            **describe_machine(),
            "seconds": before.get("seconds", 0.0),
            "started_at": _now(),
            "finished_at": None,
        }
        self._write()

    def stop(self, step: Step, seconds: float, finished: bool) -> None:
        """Record that a step has ended, after `seconds` more. A step that has `finished` is not run again."""
        entry = self.steps[step.name]
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["finished_at"] = _now() if finished else None
        self._write()

    def is_pushed(self, step: Step) -> bool:
        """Return whether the step was pushed to the Hub as its settings ask for, or does not have to be, or cannot."""
        return not self.is_finished(step.name) or self.steps[step.name].get("pushed", []) == list(step.push)

    def set_pushed(self, step: Step) -> None:
        """Record that a finished step was pushed."""
        self.steps[step.name]["pushed"] = list(step.push)
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def measured_seconds(run_dir: Path, recipe: str, smoke: bool) -> dict[str, float]:
    """Return the seconds of each step that finished in this run or, failing that, in a run of this recipe beside it."""
    seconds: dict[str, float] = {}
    for path in [*sorted(run_dir.parent.glob("*/run.json")), run_dir / "run.json"]:
        with contextlib.suppress(UserError):
            record = RunRecord.read(path.parent)
            if (record.content.get("recipe"), record.content.get("smoke")) == (recipe, smoke):
                seconds |= {name: entry["seconds"] for name, entry in record.steps.items() if record.is_finished(name)}
    return seconds


def _is_entry(entry: Any) -> bool:
    """Return whether this is what `RunRecord.start` wrote for a step."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and isinstance(entry.get("seconds"), int | float)
        and 0 <= entry["seconds"] < CENTURY
        and all(isinstance(entry.get(key, {}), dict) for key in ("values", "inputs", "data", "files"))
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def decide(
    steps: Sequence[Step], record: RunRecord, again: Collection[str] = (), forced: Collection[str] = ()
) -> dict[str, Decision]:
    """Decide what to do about each step. Moving or renaming the modules of a step does not make it due.

    Args:
        steps: Each after all that it needs.
        record: What was done before.
        again: Names of the steps that run even if they have finished.
        forced: Names of those of which nothing is kept.

    Returns:
        The decisions by name.
    """
    decisions: dict[str, Decision] = {}
    data = _fingerprints({need: folder for step in steps for need, folder in step.data.items()})
    for step in steps:
        decision = _judge(step, record, {*again, *forced}, decisions, data)
        if step.name in record.steps:
            written = step.leftovers if decision.action == "start" else ()
            if decision.action == "continue" and record.is_finished(step.name):
                written = (step.output,)
            there = tuple(path for path in written if path.is_file() or (path.is_dir() and any(path.iterdir())))
            decision = replace(decision, replaced=there, deletes=step.name in forced)
        decisions[step.name] = decision
    return decisions


def _judge(
    step: Step, record: RunRecord, again: Collection[str], decisions: Mapping[str, Decision], data: Mapping[str, str]
) -> Decision:
    """Return what to do about a step; `decisions` are those about the steps before it."""
    entry = record.steps.get(step.name)
    if entry is None:
        return Decision("start", "has not run yet")
    if step.name in again and record.is_finished(step.name):
        return Decision("start", "finished, but asked to run again")
    changes = Changes.find(step, entry.get("values", {}))
    is_longer = continues(step.output, changes.effective, step.values)
    if changes.effective and not is_longer:
        return Decision("start", f"its configuration changed ({changes})")
    if due := [need for need in step.needs if need in decisions and decisions[need].action != "skip"]:
        others = f" and {len(due) - MOST_NAMED} more" if len(due) > MOST_NAMED else ""
        return Decision("start", f"depends on {', '.join(due[:MOST_NAMED])}{others}")
    if {need: run for need, run in entry.get("inputs", {}).items() if need in step.needs} != record.inputs(step):
        return Decision("start", "its inputs have been made again")
    if edited := [need for need in step.data if entry.get("data", {}).get(need, data[need]) != data[need]]:
        return Decision("start", f"the data of {', '.join(edited)} were changed")
    files = {str(path): fingerprint_path(path) for path in step.files}
    if entry.get("files", files) != files:
        return Decision("start", "the files that it reads changed")
    if is_longer:
        return Decision("continue", f"goes on from its last checkpoint ({changes}), on the schedule of the new total")
    if not record.is_finished(step.name):
        return Decision("resume", "waits for people's votes" if step.stage.by_people else "was interrupted")
    if not step.is_complete:
        return Decision("start", f"finished, but {step.product} is missing or incomplete")
    total = number_of(newest_state(step.output), "max_steps") if step.launched else 0
    if total > number_of(step.values, "max_steps") > 0:
        return Decision("start", f"was continued outside of this run, to {total} steps; raise max_steps to keep that")
    return Decision("skip", f"finished; without effect on it: {changes}" if changes.harmless else "finished")


def _fingerprints(folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the fingerprints of files and folders, by the same names."""
    return {name: fingerprint_path(folder) for name, folder in folders.items()}
