"""The fields of argument dataclasses, and the conversion of YAML and command line values to their types."""

import contextlib
import dataclasses
import difflib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, EnumType
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pipeline.errors import Problem
from pipeline.files import as_list

READ = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "reward_model_path", "value_model_path")
"""Fields that may name a directory that a step reads."""


def argument_types(main: Callable[..., Any]) -> list[type]:
    """Return the argument dataclasses in the signature of a recipe's `main`, in order."""
    return [hint for name, hint in get_type_hints(main).items() if name != "return" and isinstance(hint, type)]


def samples_completions(config: object) -> bool:
    """Return whether a trainer with this configuration samples completions, as GRPO, PPO and RLOO do.

    `config` is an argument dataclass or an instance of one. TRL's configurations for sampling say how many completions
    each prompt gets.
    """
    return hasattr(config, "num_generations")


@cache
def field_types(*dataclass_types: Any) -> Mapping[str, Any]:
    """Return the type of every field of argument dataclasses, by name."""
    resolved = {kind: get_type_hints(kind) for kind in dataclass_types}
    return {item.name: resolved[kind][item.name] for kind in resolved for item in dataclasses.fields(kind) if item.init}


def read_values(given: Mapping[str, Any], dataclass_types: Sequence[Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Convert values to the types of their fields; also return the problems of the others."""
    hints = field_types(*dataclass_types)
    choices = {item.name: item.metadata.get("choices") for kind in dataclass_types for item in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        if name not in hints:
            problems.append(unknown_field(str(name), value, hints))
            continue
        try:
            converted = convert(value, hints[name])
        except TypeError as error:
            problems.append(Problem(name, repr(value), str(error)))
            continue
        known = choices[name]
        if known is not None and any(item not in known for item in as_list(converted) if item is not None):
            problems.append(Problem(name, repr(value), f"must be one of {', '.join(map(str, known))}"))
        else:
            values[name] = converted
    return values, problems


def unknown_field(name: str, value: object, known: Iterable[str]) -> Problem:
    """Return the problem for an unknown field, with the nearest known name as a suggestion."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    remedy = f"unknown field; did you mean `{nearest[0]}`?" if nearest else "unknown field; see --help for those known"
    return Problem(name, value, remedy)


def members(hint: Any) -> list[Any]:
    """Return the types that a field accepts: the members of a union, or the type itself."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def known_values(hint: Any) -> list[Any]:
    """Return the values of a `Literal` or an `Enum`, and none of other types."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [option.value for option in hint] if isinstance(hint, type) and issubclass(hint, Enum) else []


def _options(hint: Any) -> list[Any]:
    """Return the members of a type, without `None`, and without a `str` that only stands for an enumeration."""
    found = [member for member in members(hint) if member is not types.NoneType]
    return [member for member in found if member is not str or not any(isinstance(one, EnumType) for one in found)]


def describe_type(hint: Any) -> str:
    """Return a type in words, to follow "must be"."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(map(describe_type, options))
    (kind,) = options
    if known := known_values(kind):
        return "one of " + ", ".join(map(str, known))
    if get_origin(kind) is list:
        return f"a list, each item {describe_type(get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(get_origin(kind) or kind, "of a different type")


def convert(value: Any, hint: Any) -> Any:
    """Convert a value to the type of its field (1 to 1.0, one item to a list of one), or raise a `TypeError`."""
    if value is None and types.NoneType in members(hint):
        return None
    # An exact match first: for `int | str`, 5 stays a number. For Python, True is a number as well.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and value == value // 1,
        float: number,
        # `run_name: 2026` means text, although YAML reads a number.
        str: number or isinstance(value, str),
        dict: isinstance(value, dict) or (isinstance(value, str) and value.startswith("{")),
        list: False,
    }
    for kind in sorted(_options(hint), key=lambda kind: type(value) is not (get_origin(kind) or kind)):
        origin, known = get_origin(kind) or kind, known_values(kind)
        if origin is list and value is not None:
            with contextlib.suppress(TypeError):
                return [convert(item, get_args(kind)[0]) for item in as_list(value)]
        elif value in known:
            return value
        # Neither YAML nor a text is an instance of a dataclass, such as accelerate's `ParallelismConfig`.
        elif not known and fits.get(origin, not dataclasses.is_dataclass(origin)):
            return origin(value) if origin in (int, str) else value
    raise TypeError(f"must be {describe_type(hint)}")
