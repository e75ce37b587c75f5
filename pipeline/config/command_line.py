"""The command line of a recipe: `argparse`, with every mistake told at once instead of the first one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from trl import TrlParser

from pipeline.config.yaml_file import describe, read_yaml
from pipeline.errors import Problem, UserError


class Parser(TrlParser):
    """TRL's parser; a mistake on the command line is raised as `argparse.ArgumentError`, never printed."""

    def __init__(self, dataclass_types: Iterable[Any]) -> None:
        # An abbreviation (`--learn 1`) would be accepted, and start to mean something else with the next
        # release.
        super().__init__(dataclass_types, allow_abbrev=False, exit_on_error=False)

    def error(self, message: str) -> Any:
        raise argparse.ArgumentError(None, message)


def take_config(arguments: list[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Remove `--config PATH` from the command line, and read what it names."""
    paths: list[str] = []
    for position in reversed([i for i, text in enumerate(arguments) if text.partition("=")[0] == "--config"]):
        _, sign, path = arguments[position].partition("=")
        value = [path] if sign else _value_at(arguments, position)[:1]
        paths.insert(0, value[0] if value else "")
        del arguments[position : position + (1 if sign else 1 + len(value))]
    if not paths:
        return {}, []
    if "" in paths:
        return {}, [Problem("--config", "nothing", "give the path of a YAML file")]
    if len(paths) > 1:
        return {}, [Problem("--config", " and ".join(paths), "only one file is read; name one")]
    try:
        return read_yaml(paths[0]), []
    except UserError as error:
        return {}, list(error.problems)


def unknown(name: str, value: object, known: Iterable[str]) -> Problem:
    nearest = difflib.get_close_matches(name.lstrip("-"), list(known), n=1)
    remedy = f"unknown field; did you mean `{nearest[0]}`?" if nearest else "unknown field; see --help for those known"
    return Problem(name, value, remedy)


def read_command_line(
    parser: Parser, arguments: list[str], hints: dict[str, Any]
) -> tuple[dict[str, Any], list[Problem]]:
    """Values given on the command line, by field name, and what is wrong with the rest."""
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
        except argparse.ArgumentError as error:
            # argparse stops at the first mistake: note it, take that option away, and go on to the next.
            option = (error.argument_name or "").split("/")[0]
            names = (error.argument_name or "").split("/")
            at = [i for i, text in enumerate(arguments) if text.partition("=")[0] in names]
            if not at:
                problems.append(Problem("command line", " ".join(arguments), error.message))
                return {}, problems
            values = {i: _value_at(arguments, i) for i in at}
            # An option may stand there twice; the message tells the value of the wrong one.
            wrong = next((i for i in reversed(at) if repr(values[i][-1:]).strip("[]") in error.message), at[0])
            name = option.lstrip("-").replace("-", "_")
            value = " ".join(values[wrong])
            problems.append(Problem(name, repr(value), f"must be {_describe(parser, name, hints)}"))
            del arguments[wrong : wrong + 1 + (0 if "=" in arguments[wrong] else len(values[wrong]))]
            continue
        break
    position = 0
    while position < len(rest):
        name, _, value = rest[position].partition("=")
        position += 1
        if name.startswith("--"):
            if not value and position < len(rest) and not rest[position].startswith("--"):
                value = rest[position]
                position += 1
            problems.append(unknown(name[2:].replace("-", "_"), value, hints))
        else:
            problems.append(Problem("command line", name, "belongs to no option; see --help"))
    given = {name: value for name, value in vars(namespace).items() if name in hints}
    # `null`, as in YAML, takes back what the file says; argparse would take it for text.
    optional = {name for name in given if type(None) in get_args(hints[name])}
    return {
        name: None if name in optional and value in ("null", ["null"]) else value for name, value in given.items()
    }, problems


def _describe(parser: Parser, name: str, hints: Mapping[str, Any]) -> str:
    """What an option takes, in words."""
    action = next((action for action in parser._actions if action.dest == name), None)
    if action is not None and action.choices:
        return "one of " + ", ".join(str(choice) for choice in action.choices)
    return describe(hints.get(name, str))


def _value_at(arguments: list[str], position: int) -> list[str]:
    """What an option on the command line is given: `--option=value`, or all words until the next option."""
    _, sign, value = arguments[position].partition("=")
    if sign:
        return [value]
    rest = arguments[position + 1 :]
    end = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
    return rest[:end]
