"""The output directory of a training run: whether the run may write to it, and the record of the run it belongs to.

The record is a file with the arguments of the run, all defaults included. A command with the same arguments resumes the
run, one with more steps continues it, and any other one is rejected:

    parse             check_output_directory    compares the arguments with the record, if there is one
                      attach_arguments          keeps the arguments with `TrainingArguments`
    training starts   record_arguments          writes the record
"""

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pipeline.config.fields import READ
from pipeline.config.weight_fields import can_continue, has_effect
from pipeline.errors import Problem
from pipeline.files import as_list, check_directory, check_links, read_json, write_text

RECORD = "arguments.json"
"""The file with the record."""

RESOLVED = "resolved_arguments"
"""Attribute of `TrainingArguments` for the content of the record, made before trainers change their arguments."""

REQUESTED = "requested_arguments"
"""Attribute of `TrainingArguments` for what the user gave: `settings` by field, and the words of the `command` line."""

OVERWRITTEN = (
    "README.md", "config.json", "adapter_config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json",
)  # fmt: skip
"""Files that a run would overwrite. A directory with one of them but without a record is not that of a run."""


def recorded_template_kwargs(model: str) -> dict[str, Any]:
    """Return the `chat_template_kwargs` that a model was trained with.

    `model` is the output directory of a run or one of its checkpoints. For anything else, such as the name of a model
    on the Hub, the mapping is empty.
    """
    folder = Path(model).absolute()
    if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        # A checkpoint shares the record of its run.
        folder = folder.parent
    kwargs = read_json(folder / RECORD).get("chat_template_kwargs")
    if not isinstance(kwargs, dict):
        return {}
    return kwargs


def check_output_directory(arguments: Iterable[Any], machine_fields: Collection[str] = ()) -> list[Problem]:
    """Check, before anything is written, that the run may write to its output directory.

    The directory must be writable, not be read by the run, not be the folder of all stages (which has a run.json), not
    belong to another run, and not lead elsewhere by links.

    Args:
        arguments: The run's argument dataclasses. Without `TrainingArguments` among them, nothing is checked.
        machine_fields: Fields whose values the machine decided. They may differ from the record, as a run may be
            resumed on another machine.

    Returns:
        A list with the first problem, or an empty one.
    """
    items = list(arguments)
    output_dir = next((item.output_dir for item in items if isinstance(item, TrainingArguments)), None)
    if output_dir is None:
        return []
    path = Path(output_dir)
    problems = check_links(path, inner=False)
    if not problems:
        problems += filter(None, [check_directory(path)])
    if problems:
        return problems
    values = to_record(items)
    remedy = _conflict_with_inputs(path.resolve(), values)
    # The report and the page would miss a model that lies next to the stages.
    if remedy is None and (path / "run.json").exists():
        remedy = f"is a run; name a folder in it, such as {path / 'NAME'}"
    if remedy is None:
        # Only now, because this walks through the directory, and it could have been the root of the file system.
        problems = check_links(path)
        if problems:
            return problems[:1]
        remedy = _conflict_with_record(path, values, machine_fields)
    if remedy is None:
        return []
    return [Problem("output_dir", output_dir, remedy)]


def _conflict_with_inputs(path: Path, values: Mapping[str, Any]) -> str | None:
    """Return why a run must not write to a path because of what it reads, as a phrase, or None if it may.

    `path` is resolved. `values` are the arguments of the run, by field.
    """
    if path == Path(path.anchor):
        return "is the root of the file system; choose another directory"
    for name in READ:
        for value in as_list(values.get(name)):
            if not value:
                continue
            source = Path(str(value))
            if os.path.exists(source) and source.resolve() == path:
                return f"is the value of {name} too, and would be overwritten; choose another directory"
            if name == "dataset_name" and os.path.isdir(source) and path.is_relative_to(source.resolve()):
                return "lies inside dataset_name, and would be read as data; choose another directory"
    return None


def _conflict_with_record(path: Path, values: Mapping[str, Any], machine_fields: Collection[str]) -> str | None:
    """Return why a run can neither start, resume nor continue in a directory, as a phrase, or None if it can.

    `values` are the arguments of the run, by field. Values of `machine_fields` are not compared with the record.
    """
    record = path / RECORD
    if not record.exists():
        foreign = next((file for file in OVERWRITTEN if (path / file).exists()), None)
        if foreign is None:
            return None
        return f"contains {foreign}, which was not written by a recipe; choose another directory"
    try:
        earlier = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return f"{record} cannot be read ({error}); choose another directory"
    # Another release may have other fields, and only what both have is compared.
    shared = sorted(set(earlier) & set(values) - {"output_dir", *machine_fields})
    changed = [name for name in shared if earlier[name] != values[name] and has_effect(name, values)]
    if not changed or can_continue(path, changed, values):
        return None
    differences = "; ".join(f"{name} was {earlier[name]!r} and is {values[name]!r}" for name in changed)
    return f"contains a run with other settings ({differences}); choose another directory or delete it"


def attach_arguments(
    training: TrainingArguments, arguments: Iterable[Any], requested: Mapping[str, Any], command: Sequence[str]
) -> None:
    """Attach all arguments of a run to its `TrainingArguments`, which are what the trainer gets.

    The attribute `RESOLVED` is for `record_arguments`, and `REQUESTED` for the model card.

    Args:
        training: The training arguments, to which the two attributes are added.
        arguments: All argument dataclasses of the run, including `training`.
        requested: Values that the user gave, by field.
        command: The words of the command line.
    """
    setattr(training, RESOLVED, to_record(arguments))
    # As plain JSON: an enumeration or a path becomes text.
    settings = json.loads(json.dumps(requested, default=str))
    setattr(training, REQUESTED, {"settings": settings, "command": command})


def record_arguments(args: TrainingArguments) -> None:
    """Write the record of a run to its output directory, unless its arguments were not built by `parser.parse`."""
    resolved = getattr(args, RESOLVED, None)
    if resolved is not None:
        write_text(Path(args.output_dir) / RECORD, json.dumps(resolved, indent=1) + "\n")


def to_record(arguments: Iterable[Any]) -> dict[str, Any]:
    """Return the content of the record: the values of argument dataclasses by field, as plain JSON, without tokens."""
    values: dict[str, Any] = {}
    for item in arguments:
        for field in dataclasses.fields(item):
            if not field.name.endswith("_token"):
                values[field.name] = getattr(item, field.name)
    return json.loads(json.dumps(values, sort_keys=True, default=str))
