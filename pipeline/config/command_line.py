"""The command line of a recipe, whose words become the values that a YAML file would give; and `--help`."""

import contextlib
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pipeline.config.fields import describe_type, field_types, known_values, members, read_values, unknown_field
from pipeline.config.recipe_folder import SHIPPED
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem

SWITCH = dict.fromkeys(("true", "t", "yes", "y", "1"), True) | dict.fromkeys(("false", "f", "no", "n", "0"), False)
"""Words that may follow a switch, in any case. A switch without a word is on."""

FLAGS = ("-h", "--help", "--help-all", "--help_all")


def read_command_line(arguments: Sequence[str], dataclass_types: Sequence[Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the options of a command line without `--config`, by field of the dataclasses, and what is wrong.

    An option is written with underscores or hyphens, and never abbreviated. Its words are parsed as YAML values are.
    """
    found: dict[str, list[str]] = {}
    strays: list[str] = []
    problems, words = [], strays
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            words = found[name.replace("-", "_")] = [value] if equals else []
        else:
            words.append(word)

    fields = {item.name: item for kind in dataclass_types for item in dataclasses.fields(kind) if item.init}
    hints = field_types(*dataclass_types)
    given: dict[str, Any] = {}
    switched_on: dict[str, Any] = {}
    for name, words in found.items():
        if name not in hints:
            problems.append(unknown_field(name, "".join(words[:1]), hints))
            strays += words[1:]
            continue
        kinds = members(hints[name])
        lists = [kind for kind in kinds if get_origin(kind) is list]
        on = fields[name].metadata.get("const", True if bool in kinds else None)
        if not words and on is not None:
            switched_on[name] = on
        elif not words:
            problems.append(Problem(name, "''", f"must be {describe_type(hints[name])}"))
        elif NoneType in kinds and words == ["null"]:
            # This unsets a field that the file sets.
            given[name] = None
        elif lists and (len(words) > 1 or next(kind for kind in kinds if kind is not NoneType) in lists):
            given[name] = [_from_word(word, members(get_args(lists[0])[0])) for word in words]
        else:
            given[name] = _from_word(words[0], kinds)
            strays += words[1:]
    values, refused = read_values(given, dataclass_types)
    problems += [Problem("command line", word, "does not belong to any option; see --help") for word in strays]
    return values | switched_on, refused + problems


def _from_word(word: str, kinds: Sequence[Any]) -> Any:
    """Return the value that a word stands for in a field of these types, or the word itself if it fits none."""
    for value in (value for kind in kinds for value in known_values(kind)):
        if str(value) == word:
            return value
    if bool in kinds and word.lower() in SWITCH:
        return SWITCH[word.lower()]
    for number in (int, float):
        if number in kinds:
            with contextlib.suppress(ValueError):
                return number(word)
    return word


def describe_options(dataclass_types: Sequence[Any], module: str, everything: bool) -> str:
    """Return the help of a recipe: all options if `everything`, else those of this project and of `recipes/` files."""
    usual = {name for path in SHIPPED.glob("**/[0-9]_*.yaml") for name in read_yaml(str(path))}
    hints = field_types(*dataclass_types)
    items = [item for kind in dataclass_types for item in dataclasses.fields(kind) if item.init]
    for base in (base for kind in dataclass_types for base in kind.__mro__ if base.__module__.startswith("pipeline.")):
        usual.update(vars(base).get("__annotations__", ()))
    often = [item for item in items if item.name in usual]
    rest = [item for item in items if item.name not in usual]
    lines = [f"usage: python -m {module} [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    lines += ["Every option is also a key of the YAML file, which the command line overrides.", "", "Often set:"]
    width = min(shutil.get_terminal_size().columns, 120)
    for item in [*often, *(rest if everything else ())]:
        if rest and item is rest[0]:
            lines += ["", "Of the libraries:"]
        meaning = " ".join(str(item.metadata.get("help") or "").replace("%%", "%").split())
        notes = [describe_type(hints[item.name])] if everything else []
        if item.default not in (None, "", dataclasses.MISSING):
            notes.append(f"default: {item.default}")
        # A sentence does not end with "e.g."
        text = meaning if everything else re.split(r"(?<=\w\w)\. ", meaning)[0].rstrip(".")
        text += f" ({'; '.join(notes)})" if notes else ""
        start = f"  --{item.name}".ljust(32) + " "
        lines.append(textwrap.fill(text, width, initial_indent=start, subsequent_indent=" " * 33))
    if rest and not everything:
        lines += ["", f"--help-all describes these in full, and {len(rest)} more, mostly from transformers and TRL."]
    return "\n".join(lines)
