"""The record of what a run has done (`run.json`), and which of its steps are due."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import Problem, UserError
from pipeline.files import write_text
from pipeline.runner.fingerprint import fingerprint, fingerprint_path, without_secrets
from pipeline.runner.machine import describe_machine
from pipeline.runner.steps import Step


@dataclass(frozen=True)
class Decision:
    """A decision about a step.

    Attributes:
        action: "skip" it, "start" it from the beginning, or "resume" it from what it has saved.
        reason: Why, as a phrase.
        fingerprint: Hash of its configuration, of the files that it reads and of the steps that it needs.
    """

    action: Literal["skip", "start", "resume"]
    reason: str
    fingerprint: str


@dataclass
class RunRecord:
    """The content of a run's `run.json`.

    Its `steps` map the name of each step that was started to an entry with:

    - `id`, which changes whenever the step starts from the beginning; `fingerprint`; `values`, its settings
    - `inputs`, the `id` of each step that it was made from; `data`, fingerprints of the data that it was made from
    - `command`; `hardware`, `versions` and `commit` of the machine that ran it; for a resumed step, of its last part
    - `seconds`, over all its parts; `started_at`; `finished_at`, null until it has finished
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
            if path.is_fifo():
                raise OSError("it is a pipe")
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
        """Record that a step starts or resumes, with `command` as typed in a shell."""
        before = self.steps.get(step.name, {}) if decision.action == "resume" else {}
        self.steps[step.name] = {
            "id": before.get("id") or secrets.token_hex(8),
            "fingerprint": decision.fingerprint,
            "values": _recorded_values(step),
            "inputs": self.inputs(step),
            "data": _fingerprints(step.data),
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
        and all(isinstance(entry.get(key, {}), dict) for key in ("values", "inputs", "data"))
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def decide(steps: Sequence[Step], record: RunRecord, forced: Collection[str]) -> dict[str, Decision]:
    """Decide what to do about each step. Moving or renaming the modules of a step does not make it due.

    Args:
        steps: Each after all that it needs.
        record: What was done before.
        forced: Names of the steps that run in any case.

    Returns:
        The decisions by name.
    """
    decisions: dict[str, Decision] = {}
    data = _fingerprints({need: folder for step in steps for need, folder in step.data.items()})
    for step in steps:
        current = fingerprint(
            {
                "kind": step.kind,
                "values": without_secrets(step.values),
                "files": {str(path): fingerprint_path(path) for path in step.files},
                "needs": {need: decisions[need].fingerprint for need in step.needs if need in decisions},
            }
        )
        action, reason = _judge(step, current, record, forced, decisions, data)
        decisions[step.name] = Decision(action, reason, current)
    return decisions


def _judge(
    step: Step,
    current: str,
    record: RunRecord,
    forced: Collection[str],
    decisions: Mapping[str, Decision],
    data: Mapping[str, str],
) -> tuple[Literal["skip", "start", "resume"], str]:
    """Return what to do about a step whose fingerprint is `current`, and why; `decisions` are those before it."""
    entry = record.steps.get(step.name)
    if entry is None:
        return "start", "has not run yet"
    if step.name in forced and record.is_finished(step.name):
        return "start", "finished, but asked to run again"
    if changes := _changes(entry.get("values", {}), _recorded_values(step)):
        return "start", f"its configuration changed ({changes})"
    if again := [need for need in step.needs if need in decisions and decisions[need].action != "skip"]:
        return "start", f"depends on {', '.join(again)}"
    if entry.get("inputs") != record.inputs(step):
        return "start", "its inputs have been made again"
    if edited := [need for need in step.data if entry.get("data", {}).get(need, data[need]) != data[need]]:
        return "start", f"the data of {', '.join(edited)} were changed"
    if entry.get("fingerprint") != current:
        return "start", "the files that it reads changed"
    if not record.is_finished(step.name):
        return "resume", "was interrupted"
    if not step.is_complete:
        return "start", f"finished, but {step.product} is missing or incomplete"
    return "skip", "finished"


def _recorded_values(step: Step) -> dict[str, Any]:
    """Return the step's settings as they are read back from `run.json`."""
    values: dict[str, Any] = json.loads(json.dumps(without_secrets(step.values), default=str))
    return values


def _fingerprints(folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the fingerprints of folders, by the same names."""
    return {name: fingerprint_path(folder) for name, folder in folders.items()}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the settings that differ, as `field: before -> now`; "" if none do."""
    fields = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in fields)


def clear(paths: Sequence[Path]) -> Iterator[Path]:
    """Delete files, and the content of directories.

    Yields:
        Each path that existed.

    Raises:
        UserError: If one cannot be deleted.
    """
    for path in filter(Path.exists, paths):
        try:
            for child in path.iterdir() if path.is_dir() else (path,):
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink()
        except OSError as error:
            raise UserError(Problem("output_dir", path, f"cannot be removed ({error.strerror}); remove it")) from error
        yield path
