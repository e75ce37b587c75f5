"""The command line of a recipe: its options, which are the fields of the argument dataclasses, and its `--help`.

The words after an option become a value as a YAML file would give it:

    --max_steps 7                      {"max_steps": 7}
    --packing                          {"packing": True}
    --report_to wandb tensorboard      {"report_to": ["wandb", "tensorboard"]}
"""

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

SWITCH_WORDS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}
"""Words, upper or lower case, that may follow an option for a bool. Without a word, it is True."""

FLAGS = ("-h", "--help", "--help-all", "--help_all")
"""Words that ask for help."""


def read_command_line(arguments: Sequence[str], dataclass_types: Sequence[Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Read the options of a command line.

    An option is written with underscores or hyphens, and never abbreviated.

    Args:
        arguments: Words of the command line, without `--config`.
        dataclass_types: Argument dataclasses, whose fields are the options.

    Returns:
        The values that fit their fields, by field, and the problems of the others.
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
        if words:
            values[name], rest = _parse_words(words, hints[name])
            strays += rest
            continue
        # As for the parsers of transformers, `const` is the value of an option without a word.
        value_without_word = fields[name].metadata.get("const", True if bool in members(hints[name]) else None)
        if value_without_word is None:
            problems.append(Problem(name, "''", f"must be {describe_type(hints[name])}"))
        else:
            switched_on[name] = value_without_word
    converted, type_problems = read_values(values, dataclass_types)
    problems += [Problem("command line", word, "does not belong to any option; see --help") for word in strays]
    return converted | switched_on, type_problems + problems


def _split_options(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the words that follow each option, by its field, and the words before the first option.

    If an option is repeated, the last one counts.

    Example:
        "a --max-steps 7 --packing" -> {"max_steps": ["7"], "packing": []}, ["a"]
    """
    options: dict[str, list[str]] = {}
    strays: list[str] = []
    # The list that the next word belongs to.
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


def _parse_words(words: list[str], hint: Any) -> tuple[Any, list[str]]:
    """Return the value that the words after an option stand for, and the words that are too many.

    `words` is not empty. `hint` is the type of the field. The value may still be of another type.
    """
    kinds = members(hint)
    if NoneType in kinds and words == ["null"]:
        # This unsets a field that the file sets.
        return None, []
    lists = [kind for kind in kinds if get_origin(kind) is list]
    first_kind = next(kind for kind in kinds if kind is not NoneType)
    # For `list[str] | str`, one word is a list of one; for `str | list[str]`, it is a text.
    if first_kind in lists or (lists and len(words) > 1):
        item_kinds = members(get_args(lists[0])[0])
        return [_from_word(word, item_kinds) for word in words], []
    return _from_word(words[0], kinds), words[1:]


def _from_word(word: str, kinds: Sequence[Any]) -> Any:
    """Return the value that a word stands for in a field that accepts these types, or the word itself if it is text."""
    for kind in kinds:
        for value in literal_values(kind):
            if str(value) == word:
                return value
    if bool in kinds and word.lower() in SWITCH_WORDS:
        return SWITCH_WORDS[word.lower()]
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
        everything: Whether all options are described, with their types. Otherwise, the help only describes fields that
            this project defines or that a YAML file in `recipes/` sets.
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
    """Return an option of the help, wrapped at `width`: its name on the left, its meaning and its notes on the right.

    --max_steps                  Number of steps (a whole number; default: -1)
    """
    if item.default not in (None, "", dataclasses.MISSING):
        notes = [*notes, f"default: {item.default}"]
    if notes:
        meaning += f" ({'; '.join(notes)})"
    start = f"  --{item.name}".ljust(32) + " "
    return textwrap.fill(meaning, width, initial_indent=start, subsequent_indent=" " * 33)
