"""The record of a run, and the trash for the earlier output of steps that start again.

    runs/pocket/run.json           `RunRecord`: with which settings and inputs each step ran, and for how long
    runs/pocket/.trash/<time>/     `clear`: what was in the way when a step started again, at its place in the run

Whether a step is due (`pipeline.runner.due`) is found by comparing the record with the current settings and with the
fingerprints of the current inputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.config.machine import describe_machine
from pipeline.data.arguments import DIVISION
from pipeline.data.votes import VOTES_FILE
from pipeline.errors import Problem, UserError, refuse
from pipeline.files import check_links, read_run, write_text
from pipeline.runner.steps import Step

READ_WHOLE_BYTES = 64 * 2**20
"""Maximum size of a file whose content is hashed. A larger one is identified by its size and modification time, because
reading a whole corpus takes minutes."""

TRASH = ".trash"
"""Folder in a run's directory. Each command that moves something there makes a subfolder named by the time."""


@dataclass
class RunRecord:
    """The content of a run's `run.json`, as it is read from the file and written to it.

    `steps` maps the name of each step that was started to an entry with:

    - `id`, which changes whenever the step starts from the beginning or continues; `values`, its settings
    - `inputs`, the `id` of each step that it was made from; `data` and `files`, fingerprints of its other inputs
    - `command`; `hardware`, `versions` and `commit` of the machine that ran it last
    - `seconds`, over all attempts; `peak_memory`, resident bytes of its largest process, 0 if unknown
    - `started_at`; `finished_at`, null until it has finished
    - `pushed`, the arguments of `fourstage` that pushed it to the Hub, if it was pushed
    - `division`, how rows of a single split are held out (see `pipeline.data.arguments.DIVISION`)
    - `lost`, the rows that it truncated or dropped, `evaluated_on`, `read` and, in a smoke run, `first_row`: what it
      reported about its data, if anything (see `pipeline.progress`)

    Next to `steps`, there are facts about the whole run:

    - `since`, in the run of one seed, names its first own step, if it shares the earlier ones with the enclosing run
    - `recipe`, `seed` and `smoke`, from the last command

    Attributes:
        path: The file, which need not exist yet.
        content: All that it says; change it by `update`.
        steps: The entries of the steps, by name; they are part of `content`.
    """

    path: Path
    content: dict[str, Any]
    steps: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, run_dir: Path) -> RunRecord:
        """Return the record of the run in `run_dir`, empty for a new one; raise a `UserError` if it is damaged."""
        path = run_dir / "run.json"
        content = read_run(run_dir, "output_dir")
        steps = content.setdefault("steps", {})
        if not all(isinstance(entry.get("id"), str) for entry in steps.values()):
            raise UserError(Problem("output_dir", path, "is not the record of a run; remove it"))
        return cls(path, content, steps)

    def is_finished(self, name: str) -> bool:
        """Return whether the step has finished."""
        return bool(self.steps.get(name, {}).get("finished_at"))

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each step that has finished, by name."""
        return {name: entry["seconds"] for name, entry in self.steps.items() if self.is_finished(name)}

    def inputs(self, step: Step) -> dict[str, str]:
        """Return the `id` of each finished step that `step` needs."""
        return {need: self.steps[need]["id"] for need in step.needs if self.is_finished(need)}

    def update(self, **facts: Any) -> None:
        """Add facts about the whole run, and write the file."""
        self.content.update(facts)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def start(self, step: Step, action: str, command: str) -> None:
        """Record that a step starts, resumes or continues.

        Args:
            step: The step.
            action: What it does, as in `pipeline.runner.due.Decision`.
            command: Its command, as a user types it.
        """
        earlier: Mapping[str, Any] = {}
        if action != "start":
            # A step that resumes or continues adds to its seconds.
            earlier = self.steps.get(step.name, {})
        # A new id makes the steps due that depend on this one. Only a step that resumes makes the same model as before.
        identity = secrets.token_hex(8)
        if action == "resume":
            identity = earlier.get("id") or identity
        self.steps[step.name] = {
            "id": identity,
            "values": recorded_values(step),
            "inputs": self.inputs(step),
            "data": {name: fingerprint(folder) for name, folder in step.data.items()},
            "files": {str(path): fingerprint(path) for path in step.files},
            "command": command,
            "division": DIVISION,
            **describe_machine(),
            "seconds": earlier.get("seconds", 0.0),
            "peak_memory": earlier.get("peak_memory", 0),
            "started_at": _now(),
            "finished_at": None,
        }
        self.update()

    def stop(self, step: Step, seconds: float, finished: bool, peak_memory: int = 0, lost: object = ()) -> None:
        """Record that a step has ended.

        Args:
            step: The step.
            seconds: How long this attempt took, which is added to the earlier ones.
            finished: Whether the step is complete.
            peak_memory: Resident bytes of its largest process, 0 if unknown.
            lost: The rows that it truncated or dropped (see `pipeline.progress.report_lost`), empty or None for none.
        """
        entry = self.steps[step.name]
        if lost:
            entry["lost"] = lost
        entry["peak_memory"] = max(entry["peak_memory"], peak_memory)
        entry["seconds"] = round(entry["seconds"] + seconds, 3)
        entry["finished_at"] = None
        if finished:
            entry["finished_at"] = _now()
        self.update()


def _now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def share_steps(steps: Sequence[Step], run_dir: Path, seed_dir: Path, since: str) -> None:
    """Link the output of a run's finished steps into the new run of another seed, which need not run them again.

    Checkpoints are left out, because only a step that trains further needs them.

    Args:
        steps: The steps to share; the steps among them that have not finished are left out.
        run_dir: Directory of the run.
        seed_dir: Directory of the new run.
        since: Name of the first step that is not shared, which the record of the new run gets.
    """
    record = RunRecord.read(run_dir)
    new_record = RunRecord.read(seed_dir)
    finished = [step for step in steps if record.is_finished(step.name)]
    # A hard link to what a link leads to would be followed whenever the new run writes.
    outputs = [path for step in finished for path in step.leftovers or (step.output,)]
    refuse(*check_links(*outputs, home=run_dir), *check_links(seed_dir, home=run_dir))
    for step in finished:
        for path in step.leftovers or (step.output,):
            target = seed_dir / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                ignored = shutil.ignore_patterns("checkpoint-*")
                shutil.copytree(path, target, ignore=ignored, copy_function=_link, dirs_exist_ok=True)
            elif path.exists():
                _link(path, target)
        new_record.steps[step.name] = record.steps[step.name]
    new_record.update(since=since)


def _link(source: str | Path, target: str | Path) -> None:
    """Make a hard link `target` to the file `source`, unless an interrupted attempt has already made it."""
    with contextlib.suppress(FileExistsError):
        os.link(source, target)


def clear(paths: Sequence[Path], trash: Path | None, exception: str = "") -> list[Path]:
    """Move files and the contents of directories to the trash, or delete them.

    The directories themselves stay, because they may be another disk, or links to a folder in the run.

    Example:
        clear([run / "2_sft"], run / ".trash/2026-01-31T12-00-00", exception="checkpoint-*")
        moves runs/x/2_sft/config.json to runs/x/.trash/2026-01-31T12-00-00/2_sft/config.json, for instance, and
        leaves runs/x/2_sft/checkpoint-100 where it is.

    Args:
        paths: Files and directories in the run's directory; some may not exist.
        trash: Folder `<run>/.trash/<time>`; None to delete the files.
        exception: Pattern of names that stay when files are moved.

    Returns:
        The paths that existed.
    """
    present = [path for path in paths if path.exists()]
    for path in present:
        children = list(path.iterdir()) if path.is_dir() else [path]
        if trash is None:
            for child in children:
                _delete(child)
            continue
        run_dir = trash.parents[1]
        # The record of the run has the settings they were made with.
        if not trash.exists():
            trash.mkdir(parents=True)
            shutil.copy2(run_dir / "run.json", trash)
        target = trash / path.relative_to(run_dir)
        folder = target if path.is_dir() else target.parent
        folder.mkdir(parents=True, exist_ok=True)
        for child in children:
            if not fnmatch(child.name, exception):
                shutil.move(child, folder / child.name)
    return present


def _delete(path: Path) -> None:
    """Delete a file, a directory with its contents, or a link, but not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def recorded_values(step: Step) -> dict[str, Any]:
    """Return the step's settings as `run.json` keeps them: as JSON values, and without secrets."""
    secret_fields = ("hub_token", "push_to_hub_token", "token", "api_key", "password")
    values = {key: value for key, value in step.values.items() if key not in secret_fields}
    variables = values.get("env")
    if isinstance(variables, Mapping):
        # The values of environment variables may be secrets, so only their names are kept.
        values["env"] = sorted(map(str, variables))
    return json.loads(json.dumps(values, default=str))


def fingerprint(path: Path) -> str:
    """Return a hash of a file, or of all files in a folder, which changes when their content does.

    Of large or unreadable files, the size and the modification time are hashed. Renaming a file in the folder changes
    the hash; moving the whole folder does not. A path that does not exist has the hash of nothing.
    """
    # In a folder of people's votes, all other files are derived from the votes, or serve to collect more of them.
    if (path / VOTES_FILE).is_file():
        path /= VOTES_FILE
    digest = hashlib.sha256()
    # The page makes an empty file of votes as soon as it is opened, which must not differ from no file.
    if path.name == VOTES_FILE and path.is_file() and path.stat().st_size == 0:
        return digest.hexdigest()
    files = [path]
    if not path.is_file():
        files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    for file in files:
        name = "" if file == path else file.relative_to(path).as_posix()
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0".encode())
        identity = str(status.st_mtime_ns).encode()
        if status.st_size <= READ_WHOLE_BYTES:
            # The step itself reports a file that cannot be read.
            with contextlib.suppress(OSError):
                identity = file.read_bytes()
        digest.update(identity)
    return digest.hexdigest()
