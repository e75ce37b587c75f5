"""What a run has done so far (`run.json`), and from it what is due."""

from __future__ import annotations

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
from pipeline.runner.steps import Step


@dataclass(frozen=True)
class Decision:
    """What is to be done about a step.

    Args:
        action: "skip" it, "start" it anew, or "resume" it from what it has saved.
        reason: why, as a phrase.
        fingerprint: of its configuration, of the files that it names and of the steps that it needs.
    """

    action: Literal["skip", "start", "resume"]
    reason: str
    fingerprint: str


@dataclass
class RunRecord:
    """The content of a run's `run.json`.

    `steps` maps the name of each step that was started to its `fingerprint`, `values` (settings), `inputs`
    (the `id` of each step that it was made from), `data` (fingerprints of the data that it was made from),
    `command`, `id`, `seconds`, `started_at` and `finished_at`
    (null until it has finished).
    """

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """The record of the run in `run_dir`, empty if there is none.

        Raises:
            UserError: `run.json` is damaged.
        """
        path = run_dir / "run.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        except NotADirectoryError:
            raise UserError(Problem("output_dir", run_dir, "is, or lies below, a file; choose a directory")) from None
        except (OSError, ValueError) as error:
            raise UserError(Problem("output_dir", path, f"cannot be read ({error}); remove it")) from error
        steps = content.get("steps", {}) if isinstance(content, dict) else None
        if not isinstance(steps, dict) or not all(isinstance(step, dict) for step in steps.values()):
            raise UserError(Problem("output_dir", path, "is no record of a run; remove it"))
        return cls(path, content)

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Name -> record of each step that was started."""
        steps: dict[str, dict[str, Any]] = self.content.setdefault("steps", {})
        return steps

    def is_finished(self, name: str) -> bool:
        """Whether the step has been run to its end."""
        return bool(self.steps.get(name, {}).get("finished_at"))

    def inputs(self, step: Step) -> dict[str, str]:
        """The `id` of each finished step that `step` needs."""
        return {need: self.steps[need]["id"] for need in step.needs if self.is_finished(need)}

    def describe(self, **facts: Any) -> None:
        """Write facts about the whole run."""
        self.content.update(facts)
        self._write()

    def start(self, step: Step, decision: Decision, command: str) -> None:
        """Write that the step starts or goes on, with `command` as typed in a shell."""
        before = self.steps.get(step.name, {}) if decision.action == "resume" else {}
        self.steps[step.name] = {
            "id": before.get("id") or secrets.token_hex(8),
            "fingerprint": decision.fingerprint,
            "values": json.loads(json.dumps(without_secrets(step.values), default=str)),
            "inputs": self.inputs(step),
            "data": _contents(step.data),
            "command": command,
            "seconds": before.get("seconds", 0.0),
            "started_at": _now(),
            "finished_at": None,
        }
        self._write()

    def stop(self, step: Step, seconds: float, finished: bool) -> None:
        """Write that the step has ended, after `seconds` more; `finished` if it need not run again."""
        entry = self.steps[step.name]
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["finished_at"] = _now() if finished else None
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def decide(steps: Sequence[Step], record: RunRecord, forced: Collection[str]) -> dict[str, Decision]:
    """Decide about every step.

    Args:
        steps: each after all that it needs.
        record: what was done before.
        forced: names of the steps that run in any case.

    Returns:
        Name -> decision.
    """
    decisions: dict[str, Decision] = {}
    data = _contents({need: folder for step in steps for need, folder in step.data.items()})
    for step in steps:
        print_of_step = fingerprint(
            {
                "kind": step.kind,
                "values": without_secrets(step.values),
                "files": {str(path): fingerprint_path(path) for path in step.files},
                "needs": {need: decisions[need].fingerprint for need in step.needs if need in decisions},
            }
        )
        action, reason = _judge(step, print_of_step, record, forced, decisions, data)
        decisions[step.name] = Decision(action, reason, print_of_step)
    return decisions


def _judge(
    step: Step,
    current: str,
    record: RunRecord,
    forced: Collection[str],
    decisions: Mapping[str, Decision],
    data: Mapping[str, str],
) -> tuple[Literal["skip", "start", "resume"], str]:
    entry = record.steps.get(step.name)
    if entry is None:
        return "start", "has not run yet"
    if step.name in forced and record.is_finished(step.name):
        return "start", "finished, but asked to run again"
    own = _changes(entry.get("values", {}), json.loads(json.dumps(without_secrets(step.values), default=str)))
    if own:
        return "start", f"its configuration changed ({own})"
    again = [need for need in step.needs if need in decisions and decisions[need].action != "skip"]
    if again:
        return "start", f"depends on {', '.join(again)}"
    if entry.get("inputs") != record.inputs(step):
        return "start", "what it was made from has been made again"
    edited = [need for need in step.data if entry.get("data", {}).get(need, data[need]) != data[need]]
    if edited:
        return "start", f"the data of {', '.join(edited)} were changed"
    if entry.get("fingerprint") != current:
        return "start", "the files that it reads changed"
    if not record.is_finished(step.name):
        return "resume", "was cut short"
    if not step.product.exists():
        return "start", f"finished, but {step.product} is gone"
    return "skip", "finished"


def _contents(folders: Mapping[str, Path]) -> dict[str, str]:
    """Fingerprints of folders, by the same names."""
    return {name: fingerprint_path(folder) for name, folder in folders.items()}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, as `field: before -> now`; "" if none do."""
    fields = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in fields)


def clear(paths: Sequence[Path]) -> Iterator[Path]:
    """Delete files, and the content of directories.

    Yields:
        Each path that was there.

    Raises:
        UserError: one cannot be deleted.
    """
    for path in paths:
        try:
            if path.is_dir():
                for child in path.iterdir():
                    if child.is_dir() and not child.is_symlink():
                        shutil.rmtree(child)
                    else:
                        child.unlink()
            elif path.exists():
                path.unlink()
            else:
                continue
        except OSError as error:
            raise UserError(Problem("output_dir", path, f"cannot be removed: {error.strerror}")) from error
        yield path
