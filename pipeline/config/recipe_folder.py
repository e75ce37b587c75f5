"""Recipe folders: those that come with the package, and the inputs of a step that an earlier step has yet to write."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.fields import READ
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import as_list
from pipeline.stages import stage_order

SHIPPED = Path(__file__).parents[2] / "recipes"
"""The folder with the recipes of the package, and with launch files in `accelerate/`."""
LAUNCH_FILE = "accelerate_config.yaml"


def find_shipped(path: Path) -> Path:
    """Return the recipe or launch file of the package that a path names, or the path itself.

    A path that exists takes precedence. Names in the package are `pocket`, `recipes/pocket/2_sft.yaml` and
    `accelerate_config.yaml`.
    """
    if os.path.exists(path) or path.is_absolute():
        return path
    inner = path
    if path.parts[0] == SHIPPED.name:
        inner = Path(*path.parts[1:])
    for shipped in (SHIPPED / inner, SHIPPED / "accelerate" / inner):
        if os.path.exists(shipped):
            return shipped
    return path


def missing_input(settings: Mapping[str, Any], config: str) -> Problem | None:
    """Return the problem that an earlier step has not yet written an input of a step, with the command to run first.

    Args:
        settings: The settings of the step, by field.
        config: The YAML file of the step, which is in a recipe folder.

    Returns:
        The problem, or None if no input is missing that a step of the folder writes.
    """
    folder = Path(config).parent
    outputs = _output_directories(folder)
    # The step that writes a missing input -> the field that names the input, and its path.
    missing: dict[str, tuple[str, str]] = {}
    for field in READ:
        for path in as_list(settings.get(field)):
            if not path or os.path.exists(path):
                continue
            writers = [step for step, output in outputs.items() if Path(path).is_relative_to(output)]
            if writers:
                missing.setdefault(writers[0], (field, path))
    if not missing:
        return None
    # A run until the last of these steps writes all inputs.
    last = max(missing, key=stage_order)
    field, path = missing[last]
    return Problem(field, path, f"does not exist yet; first run `{as_typed('run', folder, '--until', last)}`")


def _output_directories(folder: Path) -> dict[str, Path]:
    """Return the directory that each step of a recipe folder writes, by the name of its file without the suffix."""
    outputs: dict[str, Path] = {}
    for file in sorted(find_shipped(folder).glob("[0-9]*.y*ml")):
        # The file of another step may be wrong, which is reported when that step runs.
        with contextlib.suppress(UserError):
            output = Path(str(read_yaml(str(file)).get("output_dir", "")))
            # Every relative path would be inside of "" or ".".
            if output.parts:
                outputs[file.stem] = output
    return outputs
