"""The command line of a recipe, whose words become the values that a YAML file would give; and `--help`."""

import contextlib
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pipeline.config.fields import describe_type, field_types, literal_values, members, read_values, unknown_field
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
    options, strays = _split_options(arguments)
    fields = {item.name: item for kind in dataclass_types for item in dataclasses.fields(kind) if item.init}
    hints = field_types(*dataclass_types)
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    switched_on: dict[str, Any] = {}
    for name, words in options.items():
        if name not in hints:
            problems.append(unknown_field(name, "".join(words[:1]), hints))
            strays += words[1:]
            continue
        kinds = members(hints[name])
        lists = [kind for kind in kinds if get_origin(kind) is list]
        # A list is the usual value of a field if it is the first of its types.
        is_list = bool(lists) and next(kind for kind in kinds if kind is not NoneType) in lists
        without_word = fields[name].metadata.get("const", True if bool in kinds else None)
        if not words and without_word is not None:
            switched_on[name] = without_word
        elif not words:
            problems.append(Problem(name, "''", f"must be {describe_type(hints[name])}"))
        elif NoneType in kinds and words == ["null"]:
            # This unsets a field that the file sets.
            values[name] = None
        elif is_list or (lists and len(words) > 1):
            values[name] = [_from_word(word, members(get_args(lists[0])[0])) for word in words]
        else:
            values[name] = _from_word(words[0], kinds)
            strays += words[1:]
    converted, type_problems = read_values(values, dataclass_types)
    problems += [Problem("command line", word, "does not belong to any option; see --help") for word in strays]
    return converted | switched_on, type_problems + problems


def _split_options(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the words that follow each option, by its field, and the words before the first option.

    If an option is repeated, the last one counts.
    """
    options: dict[str, list[str]] = {}
    strays: list[str] = []
    words = strays
    for argument in arguments:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        words = []
        if equals:
            words.append(value)
        options[name.replace("-", "_")] = words
    return options, strays


def _from_word(word: str, kinds: Sequence[Any]) -> Any:
    """Return the value that a word stands for in a field of these types, or the word itself if it fits none."""
    for kind in kinds:
        for value in literal_values(kind):
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
    """Return the help of a recipe.

    Args:
        dataclass_types: Argument dataclasses of the recipe.
        module: Module of the recipe, for the first line.
        everything: Whether all options are described, with their types. Otherwise, only those of this project and those
            in the YAML files of `recipes/` are.
    """
    items = [item for kind in dataclass_types for item in dataclasses.fields(kind) if item.init]
    names = _often_set(dataclass_types)
    often = [item for item in items if item.name in names]
    rest = [item for item in items if item.name not in names]
    hints = field_types(*dataclass_types)
    width = min(shutil.get_terminal_size().columns, 120)

    def describe(item: dataclasses.Field[Any]) -> str:
        if everything:
            return _describe_in_full(item, describe_type(hints[item.name]), width)
        return _describe_briefly(item, width)

    lines = [f"usage: python -m {module} [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    lines += ["Every option is also a key of the YAML file, which the command line overrides.", ""]
    lines += ["Often set:", *map(describe, often)]
    if rest and everything:
        lines += ["", "Of the libraries:", *map(describe, rest)]
    elif rest:
        lines += ["", f"--help-all describes these in full, and {len(rest)} more, mostly from transformers and TRL."]
    return "\n".join(lines)


def _often_set(dataclass_types: Sequence[Any]) -> set[str]:
    """Return the names of the fields that this project defines, or that its YAML files set."""
    names = {name for path in SHIPPED.glob("**/[0-9]_*.yaml") for name in read_yaml(str(path))}
    for kind in dataclass_types:
        for base in kind.__mro__:
            if base.__module__.startswith("pipeline."):
                names.update(vars(base).get("__annotations__", ()))
    return names


def _describe_briefly(item: dataclasses.Field[Any], width: int) -> str:
    """Return an option with the first sentence of its meaning, and its default if it has one."""
    # A sentence does not end with "e.g."
    meaning = re.split(r"(?<=\w\w)\. ", _meaning(item))[0].rstrip(".")
    return _format_option(item, meaning, [], width)


def _describe_in_full(item: dataclasses.Field[Any], kind: str, width: int) -> str:
    """Return an option with its meaning, its type `kind` in words, and its default if it has one."""
    return _format_option(item, _meaning(item), [kind], width)


def _meaning(item: dataclasses.Field[Any]) -> str:
    """Return the help of a field as one line."""
    return " ".join(str(item.metadata.get("help") or "").replace("%%", "%").split())


def _format_option(item: dataclasses.Field[Any], meaning: str, notes: list[str], width: int) -> str:
    """Return an option, its meaning and the notes behind it, in a column of its own."""
    if item.default not in (None, "", dataclasses.MISSING):
        notes = [*notes, f"default: {item.default}"]
    if notes:
        meaning += f" ({'; '.join(notes)})"
    start = f"  --{item.name}".ljust(32) + " "
    return textwrap.fill(meaning, width, initial_indent=start, subsequent_indent=" " * 33)
