"""The output directory of a run: whether the run may write to it, and the record of the run that it belongs to."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.config.fields import READ
from pipeline.config.weight_fields import continues, has_effect
from pipeline.errors import Problem
from pipeline.files import as_list, check_directory, read_json, write_text

RECORD = "arguments.json"
"""The resolved arguments of the run that a directory belongs to."""

RESOLVED = "resolved_arguments"
"""Attribute of the training arguments that keeps the record until training starts: trainers change their arguments."""

REQUESTED = "requested_arguments"
"""Attribute of the training arguments that keeps what the user gave, `settings` by field and the `command` line."""

WRITTEN = (
    "README.md", "config.json", "adapter_config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json",
)  # fmt: skip
"""Files that a run overwrites, whoever wrote them."""


def recorded_template(model: str) -> dict[str, Any]:
    """Return the `chat_template_kwargs` that the model in a folder was trained with, or {}."""
    folder = Path(model).absolute()
    if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        # A checkpoint shares the record of its run.
        folder = folder.parent
    options = read_json(folder / RECORD).get("chat_template_kwargs")
    return options if isinstance(options, dict) else {}


def check_output_directory(arguments: Iterable[Any], machine: Collection[str] = ()) -> list[Problem]:
    """Check, before anything is written, that the run may write to its output directory.

    The directory must be writable, not be read by the run, and not belong to another run.

    Args:
        arguments: The run's argument dataclasses. Without `TrainingArguments` among them, nothing is checked.
        machine: Fields that the machine decided, which may differ: a run may be resumed on another machine.

    Returns:
        A list of the problem, or an empty one.
    """
    items = list(arguments)
    output_dir = next((item.output_dir for item in items if isinstance(item, TrainingArguments)), None)
    if output_dir is None:
        return []
    path = Path(output_dir)
    problem = check_directory(path)
    if problem:
        return [problem]
    values = to_record(items)
    remedy = _conflict_with_inputs(path.resolve(), values)
    if remedy is None:
        remedy = _conflict_with_content(path, values, machine)
    if remedy is None:
        return []
    return [Problem("output_dir", output_dir, remedy)]


def _conflict_with_inputs(path: Path, values: Mapping[str, Any]) -> str | None:
    """Return why a run with the arguments `values` must not write to a resolved path, or None."""
    if path == Path(path.anchor):
        return "is the root of the file system; choose another directory"
    for name in READ:
        for value in filter(None, as_list(values.get(name))):
            source = Path(str(value))
            if os.path.exists(source) and source.resolve() == path:
                return f"is the value of {name} too, and would be overwritten; choose another directory"
            if name == "dataset_name" and os.path.isdir(source) and path.is_relative_to(source.resolve()):
                return "lies inside dataset_name, and would be read as data; choose another directory"
    return None


def _conflict_with_content(path: Path, values: Mapping[str, Any], machine: Collection[str]) -> str | None:
    """Return why a run with the arguments `values` can neither start, resume nor continue in `path`, or None."""
    record = path / RECORD
    if not record.exists():
        foreign = next((file for file in WRITTEN if (path / file).exists()), None)
        if foreign is None:
            return None
        return f"contains {foreign}, which was not written by a recipe; choose another directory"
    try:
        earlier = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{record} cannot be read ({error}); choose another directory"
    # The record is compared, not the YAML file, because releases differ in their defaults and fields.
    shared = sorted(set(earlier) & set(values) - {"output_dir", *machine})
    changed = [name for name in shared if earlier[name] != values[name] and has_effect(name, values)]
    if not changed or continues(path, changed, values):
        return None
    differences = "; ".join(f"{name} was {earlier[name]!r} and is {values[name]!r}" for name in changed)
    return f"contains a run with other settings ({differences}); choose another directory or delete it"


def keep_arguments(
    training: TrainingArguments, arguments: Iterable[Any], requested: Mapping[str, Any], command: Sequence[str]
) -> None:
    """Keep what a run was asked for in its training arguments, until `record_arguments` and the trainer need it.

    Args:
        training: The training arguments, to which two attributes are added.
        arguments: All argument dataclasses of the run.
        requested: What the user gave, by field.
        command: The command line.
    """
    setattr(training, RESOLVED, to_record(arguments))
    settings = json.loads(json.dumps(requested, default=str))
    setattr(training, REQUESTED, {"settings": settings, "command": command})


def record_arguments(args: TrainingArguments) -> None:
    """Record in the output directory which run it belongs to, if `parser.parse` has built the arguments."""
    resolved = getattr(args, RESOLVED, None)
    if resolved is not None:
        write_text(Path(args.output_dir) / RECORD, json.dumps(resolved, indent=1) + "\n")


def to_record(arguments: Iterable[Any]) -> dict[str, Any]:
    """Return resolved argument dataclasses as one mapping, as JSON represents it, without tokens."""
    values = {field.name: getattr(item, field.name) for item in arguments for field in dataclasses.fields(item)}
    values = {name: value for name, value in values.items() if not name.endswith("_token")}
    return json.loads(json.dumps(values, sort_keys=True, default=str))
