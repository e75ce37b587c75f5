"""Recipe folders: those that are installed with the package, and what one step of a folder needs from earlier ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, UserError

SHIPPED = Path(__file__).parents[2] / "recipes"
LAUNCH_FILE = "accelerate_config.yaml"

READ = (
    "model_name_or_path", "tokenizer_name_or_path", "dataset_name", "reward_model_path", "value_model_path",
)  # fmt: skip
"""Fields that may name a directory which a step reads."""


def find_shipped(path: Path) -> Path:
    """Return `path` if it exists, otherwise the recipe or launch file of that name that comes with the package.

    Args:
        path: `recipes/pocket`, `pocket`, `recipes/pocket/2_sft.yaml`, `accelerate_config.yaml`, or any other path.
    """
    if os.path.exists(path) or path.is_absolute():
        return path
    inner = Path(*path.parts[1:]) if path.parts[0] == SHIPPED.name else path
    return next((found for found in (SHIPPED / inner, SHIPPED / "accelerate" / inner) if os.path.exists(found)), path)


def missing_input(arguments: Iterable[Any], config: str) -> Problem | None:
    """Return the input of a step that an earlier step of its folder has yet to write, with the command that does.

    Args:
        arguments: The step's argument dataclasses.
        config: Its YAML file.
    """
    folder = Path(config).parent
    steps: list[tuple[str, Path]] = []
    for path in sorted(find_shipped(folder).glob("[0-9]*.y*ml")):
        with contextlib.suppress(UserError):  # the file of another step is wrong
            output = Path(str(read_yaml(str(path)).get("output_dir", "")))
            steps += [(path.stem, output)] if output.parts else []
    missing: dict[str, tuple[str, str]] = {}
    for name in READ:
        for value in (getattr(item, name, None) for item in arguments):
            for text in filter(None, value if isinstance(value, list) else [value]):
                writer = next((step for step, output in steps if Path(text).is_relative_to(output)), None)
                if writer is not None and not os.path.exists(text):
                    missing.setdefault(writer, (name, text))
    if not missing:
        return None
    last = max(missing)
    command = f"python -m pipeline run {folder} --until {last}"
    return Problem(*missing[last], f"does not exist yet; first run `{command}`")
