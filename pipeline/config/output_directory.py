"""The directory that a run writes to: whether it may, whose it is, and that nobody else writes there
meanwhile."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.files import below_a_file, unwritable, write_text

logger = logging.getLogger(__name__)

RECORD = "arguments.json"
"""The resolved arguments of the run that a directory belongs to."""

RESOLVED = "resolved_arguments"
"""Attribute of the training arguments that holds the record from parsing to the start of the training,
because trainers
change their arguments in between."""

READ = (
    "model_name_or_path",
    "tokenizer_name_or_path",
    "dataset_name",
    "reward_model_path",
    "value_model_path",
)
"""Fields that may name a directory which a run reads."""

WRITTEN = (
    "README.md", "config.json", "adapter_config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer_state.json",
)  # fmt: skip
"""Files that a run writes over, whoever wrote them."""


WITHOUT_EFFECT = re.compile(
    r"output_dir|logging_|log_|save_|eval_|hub_|push_|report_to|run_name|project|trackio|disable_tqdm|"
    r"resume|do_|use_cpu|ddp_|bf16|fp16|tf32|torch_compile|local_rank|"
    r"dataloader_(num_workers|pin|persistent|prefetch)|"
    r"load_best_model|metric_for_best|greater_is_better|activation_checkpointing|gradient_checkpointing|"
    r"include_num_input|skip_memory|debug|dataset_test_split|max_eval_samples"
)
"""Beginnings of fields that may change between a run and its continuation: where it writes, what it reports,
what the machine decides."""


def check(arguments: Iterable[Any]) -> list[Problem]:
    """Find out before anything is written whether a run may write to its output directory.

    Args:
        arguments: The run's argument dataclasses; of those, the one with an `output_dir` that is set.

    Returns:
        Why it may not: no permission, no directory, or the run of another configuration.
    """
    items = list(arguments)
    output_dir = next((item.output_dir for item in items if getattr(item, "output_dir", None)), None)
    if output_dir is None or not any(hasattr(item, "save_strategy") for item in items):
        return []
    path = Path(output_dir)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        return [Problem("output_dir", output_dir, f"is no path that can be written to ({error}); correct it")]
    if path.is_symlink() and not path.exists():
        return [Problem("output_dir", output_dir, "is a link to a directory that is not there; make that")]
    if problem := below_a_file(path):
        return [problem]
    if problem := unwritable(output_dir, (path, *path.absolute().parents)):
        return [problem]
    record, present = path / RECORD, describe(items)
    for name in READ:
        read = [Path(str(value)) for value in _as_list(present.get(name)) if value]
        if any(other.exists() and other.resolve() == path.resolve() for other in read):
            return [Problem("output_dir", output_dir, f"is what {name} names, and would be written over")]
    data = Path(str(present.get("dataset_name") or ""))
    if present.get("dataset_name") and data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        return [Problem("output_dir", output_dir, "lies inside dataset_name, and would be read with it")]
    if not record.exists():
        if found := [file for file in WRITTEN if (path / file).exists()]:
            remedy = f"holds {found[0]}, which no recipe has written there; choose another directory"
            return [Problem("output_dir", output_dir, remedy)]
        return []
    try:
        earlier = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError) as error:
        return [Problem("output_dir", output_dir, f"{record} cannot be read ({error}); choose another directory")]
    changed = [
        f"{name} was {earlier.get(name)!r} and is {present.get(name)!r}"
        for name in sorted(set(earlier) & set(present))  # another release may know other fields
        if not WITHOUT_EFFECT.match(name) and earlier.get(name) != present.get(name)
    ]
    if not changed:
        return []
    remedy = f"holds a run of another configuration ({'; '.join(changed)}); choose another directory or delete it"
    return [Problem("output_dir", output_dir, remedy)]


def expand(field: str, value: Any) -> Any:
    """A path with `~` in it as the shell would give it; values of other fields as they are."""
    if field not in (*READ, "output_dir", "resume_from_checkpoint"):
        return value
    if isinstance(value, list):
        return [expand(field, item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def claim(args: Any) -> None:
    """Record in the output directory whose it is.

    Args:
        args: Training arguments; if they did not come from `arguments.parse`, nothing is recorded.
    """
    resolved = getattr(args, RESOLVED, None)
    if resolved is not None:
        write_text(Path(args.output_dir) / RECORD, json.dumps(resolved, indent=1) + "\n")


def describe(arguments: Iterable[Any]) -> dict[str, Any]:
    """Resolved arguments as JSON holds them, without tokens.

    Args:
        arguments: Argument dataclasses.
    """
    values = {field.name: getattr(item, field.name) for item in arguments for field in dataclasses.fields(item)}
    plain = {name: value for name, value in values.items() if not name.endswith("_token")}
    return json.loads(json.dumps(plain, sort_keys=True, default=str))
