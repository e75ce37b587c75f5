"""`--help` of a recipe: the options that the recipes' files set; `--help-all` adds the libraries' own."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from pipeline.config.fields import describe_type, field_types
from pipeline.config.recipe_folder import SHIPPED
from pipeline.config.yaml_file import read_yaml

FLAGS = ("-h", "--help", "--help-all", "--help_all")

USAGE = """usage: python -m {module} [--config FILE.yaml] [--OPTION VALUE ...]

Every option is also a key of the YAML file, which the command line overrides.

Often set:"""


def describe_options(dataclass_types: Sequence[Any], module: str, everything: bool) -> str:
    """Return the help of a recipe.

    Args:
        dataclass_types: Dataclasses whose fields are the options.
        module: Name of the recipe, such as recipes.sft.
        everything: Whether to describe all options in full. By default, only options of this project and options that
            a file in `recipes/` sets.
    """
    usual = {name for path in SHIPPED.glob("**/[0-9]_*.yaml") for name in read_yaml(str(path))}
    hints = field_types(*dataclass_types)
    items = [item for kind in dataclass_types for item in dataclasses.fields(kind) if item.init]
    ours = {
        name
        for kind in dataclass_types
        for base in kind.__mro__
        if base.__module__.startswith("pipeline.")
        for name in vars(base).get("__annotations__", ())
    }
    often = [item for item in items if item.name in usual | ours]
    rest = [item for item in items if item not in often]
    lines = [USAGE.format(module=module), *(_describe(item, hints[item.name], everything) for item in often)]
    if everything:
        lines += ["", "Of the libraries:", *(_describe(item, hints[item.name], True) for item in rest)]
    elif rest:
        lines += ["", f"--help-all describes these in full, and {len(rest)} more, most of transformers and TRL."]
    return "\n".join(lines)


def _describe(item: dataclasses.Field[Any], hint: Any, in_full: bool) -> str:
    """Return the lines of one option: what it does, or the first sentence of that, its type and its default."""
    meaning = " ".join(str(item.metadata.get("help") or "").replace("%%", "%").split())
    notes = [describe_type(hint)] if in_full else []
    if item.default not in (None, "", dataclasses.MISSING):
        notes.append(f"default: {item.default}")
    # Not at the end of "e.g."
    text = meaning if in_full else re.split(r"(?<=\w\w)\. ", meaning)[0].rstrip(".")
    text += f" ({'; '.join(notes)})" if notes else ""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, initial_indent=f"  --{item.name}".ljust(32) + " ", subsequent_indent=" " * 33)
