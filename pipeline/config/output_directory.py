"""The output directory of a run: whether the run may write to it, and the record of the run that it belongs to."""

import dataclasses
import json
import os
from collections.abc import Collection, Iterable
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

ASKED = "asked_arguments"
"""Attribute of the training arguments that keeps what the user gave, `settings` by field and the `command` line."""

WRITTEN = (
    "README.md", "config.json", "adapter_config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json",
)  # fmt: skip
"""Files that a run overwrites, whoever wrote them."""


def recorded_template(model: str) -> dict[str, Any]:
    """Return the `chat_template_kwargs` that the model in a folder was trained with, or {}."""
    folder = Path(model).absolute()
    # A checkpoint shares the record of its run.
    folder = folder.parent if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") else folder
    given = read_json(folder / RECORD).get("chat_template_kwargs")
    return given if isinstance(given, dict) else {}


def check_output_directory(arguments: Iterable[Any], machine: Collection[str] = ()) -> list[Problem]:
    """Check, before anything is written, that the run may write to its output directory.

    The directory must be writable, not be read by the run, and not belong to another run. Nothing is checked without
    `TrainingArguments`. A run may be resumed on another machine, so the fields `machine` may differ.
    """
    items = list(arguments)
    output_dir = next((item.output_dir for item in items if isinstance(item, TrainingArguments)), None)
    if output_dir is None:
        return []
    path, present = Path(output_dir), to_record(items)
    if problem := check_directory(path):
        return [problem]
    real, record, remedy = path.resolve(), path / RECORD, None
    if real == Path(real.anchor):
        remedy = "is the root of the file system; choose another directory"
    for name in READ:
        for other in map(Path, map(str, filter(None, as_list(present.get(name))))):
            if os.path.exists(other) and other.resolve() == real:
                remedy = f"is the value of {name} too, and would be overwritten; choose another directory"
            elif name == "dataset_name" and os.path.isdir(other) and real.is_relative_to(other.resolve()):
                remedy = "lies inside dataset_name, and would be read as data; choose another directory"
    if remedy is None and record.exists():
        try:
            earlier = dict(json.loads(record.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            return [Problem("output_dir", output_dir, f"{record} cannot be read ({error}); choose another directory")]
        # The record is compared, not the YAML file, because releases differ in their defaults and fields.
        known = sorted(set(earlier) & set(present) - {"output_dir", *machine})
        changed = [name for name in known if earlier[name] != present[name] and has_effect(name, present)]
        if changed and not continues(path, changed, present):
            differences = "; ".join(f"{name} was {earlier[name]!r} and is {present[name]!r}" for name in changed)
            remedy = f"contains a run with other settings ({differences}); choose another directory or delete it"
    elif remedy is None and (found := next((file for file in WRITTEN if (path / file).exists()), None)):
        remedy = f"contains {found}, which was not written by a recipe; choose another directory"
    return [Problem("output_dir", output_dir, remedy)] if remedy else []


def claim(args: TrainingArguments) -> None:
    """Record in the output directory which run it belongs to, if `parser.parse` has built the arguments."""
    if (resolved := getattr(args, RESOLVED, None)) is not None:
        write_text(Path(args.output_dir) / RECORD, json.dumps(resolved, indent=1) + "\n")


def to_record(arguments: Iterable[Any]) -> dict[str, Any]:
    """Return resolved argument dataclasses as one mapping, as JSON represents it, without tokens."""
    values = {field.name: getattr(item, field.name) for item in arguments for field in dataclasses.fields(item)}
    values = {name: value for name, value in values.items() if not name.endswith("_token")}
    return json.loads(json.dumps(values, sort_keys=True, default=str))
