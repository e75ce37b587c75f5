"""Find recipe folders and launch files that come with the package, and what a step of a recipe still waits for."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.fields import READ
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import as_list

SHIPPED = Path(__file__).parents[2] / "recipes"
LAUNCH_FILE = "accelerate_config.yaml"


def find_shipped(path: Path) -> Path:
    """Return `path` if it exists, otherwise the recipe or launch file of that name in the package, if there is one.

    Names are `pocket`, `recipes/pocket/2_sft.yaml`, `accelerate_config.yaml`; any other path is returned as it is.
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


def missing_input(values: Mapping[str, Any], config: str) -> Problem | None:
    """Return the input of a step that an earlier step has yet to write, with the command for that.

    `values` are the step's settings, and `config` is its file, in a recipe folder. Return None if nothing is missing,
    or if no step of the folder writes it.
    """
    folder = Path(config).parent
    outputs: dict[str, Path] = {}
    for path in sorted(find_shipped(folder).glob("[0-9]*.y*ml")):
        # The file of another step may be wrong, which is reported when that step runs.
        with contextlib.suppress(UserError):
            output = Path(str(read_yaml(str(path)).get("output_dir", "")))
            if output.parts:
                outputs[path.stem] = output
    missing: dict[str, tuple[str, str]] = {}
    for field in READ:
        for text in filter(None, as_list(values.get(field))):
            writer = next((name for name, output in outputs.items() if Path(text).is_relative_to(output)), None)
            if writer is not None and not os.path.exists(text):
                missing.setdefault(writer, (field, text))
    if not missing:
        return None
    last = max(missing)
    field, text = missing[last]
    return Problem(field, text, f"does not exist yet; first run `{as_typed('run', folder, '--until', last)}`")
