"""The command line of a recipe: `argparse`, reporting every mistake instead of stopping at the first one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from trl import TrlParser

from pipeline.config.recipe_folder import find_shipped
from pipeline.config.yaml_file import describe_type, read_yaml, unknown_field
from pipeline.errors import Problem, UserError


class Parser(TrlParser):
    """TRL's parser; a mistake on the command line is raised as `argparse.ArgumentError`, never printed.

    Args:
        dataclass_types: Dataclasses whose fields are the options.
    """

    def __init__(self, dataclass_types: Iterable[Any]) -> None:
        # Abbreviations (`--learn 1`) are off: the next release may give them another meaning.
        super().__init__(dataclass_types, allow_abbrev=False, exit_on_error=False)
        if not dataclass_types:  # TRL then leaves the attribute out
            self.dataclass_types: list[Any] = []
        self.option_choices = {action.dest: list(action.choices) for action in self._actions if action.choices}

    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of `--config`, "" for one without a value, and the rest of a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", nargs="?", const="", default=[])
    found, rest = parser.parse_known_args(arguments)
    return found.config, rest


def take_config(arguments: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Remove `--config PATH` from the command line, and read that file.

    Args:
        arguments: The command line, changed in place. A path that does not exist may name a file of a recipe that comes
            with the package.

    Returns:
        The content of the file, empty without one, and what is wrong with it.
    """
    paths, arguments[:] = split_config(arguments)
    if not paths:
        return {}, []
    if "" in paths:
        return {}, [Problem("--config", "nothing", "give the path of a YAML file")]
    if len(paths) > 1:
        return {}, [Problem("--config", " and ".join(paths), "only one file is read; name one")]
    try:
        return read_yaml(str(find_shipped(Path(paths[0])))), []
    except UserError as error:
        return {}, list(error.problems)


def read_command_line(
    parser: Parser, arguments: list[str], hints: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Parse the options.

    Args:
        parser: Changed in place: no option is required, and none has a default.
        arguments: The command line without `--config`, changed in place.
        hints: Type of every field, by name.

    Returns:
        The values by field name, and the problems of the rest.
    """
    problems: list[Problem] = []
    for action in parser._actions:
        action.required = False
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # `--bf16` alone, as for every other switch
        if action.dest in hints:
            action.default = argparse.SUPPRESS
    while True:
        try:
            namespace, rest = parser.parse_known_args(arguments)
            break
        except argparse.ArgumentError as error:
            # argparse stops at the first mistake: note it, remove that option, and parse the rest.
            names = (error.argument_name or "").split("/")
            values = {
                i: _values_at(arguments, i) for i, text in enumerate(arguments) if text.partition("=")[0] in names
            }
            if not values:
                return {}, [*problems, Problem("command line", " ".join(arguments), error.message)]
            # An option may be given twice; the message contains the value of the wrong one.
            quoted = {i: repr(words[-1:]).strip("[]") for i, words in values.items()}
            wrong = next((i for i in reversed(values) if quoted[i] in error.message), min(values))
            name = names[0].lstrip("-").replace("-", "_")
            expected = parser.option_choices.get(name)
            remedy = f"one of {', '.join(map(str, expected))}" if expected else describe_type(hints.get(name, str))
            problems.append(Problem(name, repr(" ".join(values[wrong])), f"must be {remedy}"))
            del arguments[wrong : wrong + 1 + (0 if "=" in arguments[wrong] else len(values[wrong]))]
    while rest:
        name, _, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            problems.append(Problem("command line", name, "does not belong to any option; see --help"))
            continue
        if not value and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        problems.append(unknown_field(name[2:].replace("-", "_"), value, hints))
    given = {name: value for name, value in vars(namespace).items() if name in hints}
    for name, value in given.items():  # argparse reads the value of a union as text
        options = get_args(hints[name])
        if type(None) in options and value in ("null", ["null"]):  # this unsets a field of the file
            given[name] = None
        elif int in options and isinstance(value, str) and value.lstrip("-").isdecimal():
            given[name] = int(value)
    return given, problems


def _values_at(arguments: list[str], position: int) -> list[str]:
    """Return the values of the option at a position: `--option=value`, or all words until the next option."""
    _, sign, value = arguments[position].partition("=")
    if sign:
        return [value]
    rest = arguments[position + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]
