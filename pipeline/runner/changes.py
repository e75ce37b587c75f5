"""What has changed in a step's settings and inputs since it ran, and whether that has an effect on what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.effects import has_effect
from pipeline.data.votes import VOTES_FILE
from pipeline.files import read_json
from pipeline.runner.steps import Step, recipe_types

OF_RANDOM_MODEL = ("seed", "tokenizer_name_or_path", "output_dir")
"""Fields of pretraining that an untrained model depends on, besides its sizes."""

SHOWN, SHOWN_LENGTH = 5, 80
"""How many changes are named, and characters above which a change is named without its values."""

READ_WHOLE_BYTES = 64 * 2**20
"""A larger file is identified by its size and modification time, because reading a whole corpus takes minutes."""

SECRETS = ("hub_token", "push_to_hub_token", "token", "api_key", "password")
"""Settings that are neither written to disk nor hashed."""


@dataclass(frozen=True)
class Changes:
    """The settings that differ, by field: the value before and the present one.

    Attributes:
        effective: Those with an effect.
        harmless: Those without one.
    """

    effective: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    harmless: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @classmethod
    def find(cls, step: Step, before: Mapping[str, Any]) -> Changes:
        """Compare the settings `before` of a step with its present ones.

        A field that is left out has its default, so that writing the default down is no change.
        """
        now = recorded_values(step)
        pairs = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        effective = {name: pair for name, pair in changed.items() if _matters(step, name, now)}
        if effective and step.stage.module:
            effective = _with_defaults(step, effective, before, now)
        return cls(effective, {name: pair for name, pair in changed.items() if name not in effective})

    def __str__(self) -> str:
        """Name the fields, those with short values first and with these; of many, the first."""
        shown = self.effective or self.harmless
        said = {name: f"{name}: {before} -> {now}" for name, (before, now) in shown.items()}
        texts = sorted(
            (text if len(text) <= SHOWN_LENGTH else name for name, text in said.items()),
            key=lambda text: ": " not in text,
        )
        more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
        return ", ".join(texts[:SHOWN]) + more


def _matters(step: Step, name: str, now: Mapping[str, Any]) -> bool:
    """Return whether the field `name` has an effect on what a step writes whose settings are `now`."""
    # An evaluation names reward models to check the judge, and lengths to limit answers if nothing else does.
    if step.kind == "evaluate":
        return name != "reward_models" and not (name == "lengths" and now.get("max_new_tokens"))
    return not step.stage.measured or has_effect(name, now)


def _with_defaults(
    step: Step, changed: Mapping[str, tuple[Any, Any]], before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return those of the `changed` fields that still differ once defaults and types are known."""
    from pipeline import hardware  # these imports take seconds
    from pipeline.config.output_directory import RECORD
    from pipeline.config.parser import field_types
    from pipeline.config.yaml_file import convert
    from pipeline.models.scratch import ScratchArguments

    types = recipe_types(step)
    hints = field_types(*types)
    defaults = {item.name: item.default for kind in types for item in dataclasses.fields(kind)}
    machine = {name: choice.value for name, choice in hardware.training_defaults().items()}
    # Only training records it.
    ran_with = read_json(step.output / RECORD)
    if step.stage.file_of:
        read = {*OF_RANDOM_MODEL, *(item.name for item in dataclasses.fields(ScratchArguments))}
        changed = {name: pair for name, pair in changed.items() if name in read}

    def resolve(name: str, values: Mapping[str, Any]) -> Any:
        with contextlib.suppress(TypeError):  # the step itself will report a wrong type
            return convert(values.get(name), hints[name]) if name in hints else values.get(name)
        return values.get(name)

    earlier, present = {**defaults, **ran_with, **before}, {**defaults, **machine, **now}
    return {name: pair for name, pair in changed.items() if resolve(name, earlier) != resolve(name, present)}


def recorded_values(step: Step) -> dict[str, Any]:
    """Return the step's settings as they are read back from `run.json`."""
    values: dict[str, Any] = json.loads(json.dumps(without_secrets(step.values), default=str))
    return values


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may be written down and hashed."""
    plain = {key: value for key, value in values.items() if key not in SECRETS}
    if isinstance(variables := plain.get("env"), Mapping):  # any of which may be a key
        plain["env"] = sorted(map(str, variables))
    return plain


def fingerprint_path(path: Path) -> str:
    """Hash the content of a file or of all files in a folder; for large or unreadable ones, their size and time.

    Of a folder of people's votes, the votes count: all else there is made from them, or kept for those to come.

    Returns:
        64 hexadecimal digits.
    """
    path = path / VOTES_FILE if (path / VOTES_FILE).is_file() else path
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(inner for inner in path.rglob("*") if inner.is_file()):
        name = file.relative_to(path).as_posix() if file != path else ""
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0".encode())
        try:
            content = file.read_bytes() if status.st_size <= READ_WHOLE_BYTES else None
        except OSError:  # the step itself will report it
            content = None
        digest.update(str(status.st_mtime_ns).encode() if content is None else content)
    return digest.hexdigest()
