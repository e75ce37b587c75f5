"""The fields of argument dataclasses, and the conversion of values to their types.

Values come from a YAML file or the command line, as numbers, text, lists and so on. The type of a field is its type
hint, such as `int | None` or `list[str]`.
"""

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

REMOVED = {
    "kl_estimator": "PPO's penalty always uses k1 (k3 is logged as objective/kl_k3), and needs no field; omit it",
}
"""Fields of earlier releases, and what to do instead. A YAML file with one is rejected; in the record of a run, one is
ignored."""


def argument_types(main: Callable[..., Any]) -> list[type]:
    """Return the argument dataclasses in the signature of a recipe's `main`, in order."""
    hints = get_type_hints(main)
    return [hint for name, hint in hints.items() if name != "return" and isinstance(hint, type)]


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


def read_values(values: Mapping[str, Any], dataclass_types: Sequence[Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Convert values to the types of their fields.

    Args:
        values: Values of a YAML file or a command line, by field.
        dataclass_types: Argument dataclasses that have the fields.

    Returns:
        The values that fit, and the problems of the others.
    """
    hints = field_types(*dataclass_types)
    choices = {item.name: item.metadata.get("choices") for kind in dataclass_types for item in dataclasses.fields(kind)}
    converted: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        if name not in hints:
            problems.append(unknown_field(str(name), value, hints))
            continue
        try:
            item = convert(value, hints[name])
        except TypeError as error:
            problems.append(Problem(name, repr(value), str(error)))
            continue
        allowed = choices[name]
        if allowed is not None and any(word not in allowed for word in as_list(item) if word is not None):
            problems.append(Problem(name, repr(value), f"must be one of {', '.join(map(str, allowed))}"))
        else:
            converted[name] = item
    return converted, problems


def unknown_field(name: str, value: object, names: Iterable[str]) -> Problem:
    """Return the problem that a field is not one of `names`.

    The remedy says what replaces a field of an earlier release. For any other field, it proposes the name most like it.
    """
    if name in REMOVED:
        return Problem(name, value, REMOVED[name])
    nearest = difflib.get_close_matches(name, list(names), n=1)
    if nearest:
        return Problem(name, value, f"unknown field; did you mean `{nearest[0]}`?")
    return Problem(name, value, "unknown field; see --help for those known")


def members(hint: Any) -> list[Any]:
    """Return the types that a field accepts: [int, NoneType] for `int | None`, and [int] for `int`."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def literal_values(hint: Any) -> list[Any]:
    """Return the values of a `Literal` or an `Enum`, [] for other types."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [option.value for option in hint]
    return []


def _options(hint: Any) -> list[Any]:
    """Return the types that a field accepts apart from None.

    transformers declares a field with an enumeration as `SaveStrategy | str`, although it only accepts the values of
    the enumeration. That `str` is omitted as well.
    """
    options = [member for member in members(hint) if member is not types.NoneType]
    if any(isinstance(member, EnumType) for member in options):
        return [member for member in options if member is not str]
    return options


def describe_type(hint: Any) -> str:
    """Return a type in words, to follow "must be"."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(map(describe_type, options))
    (kind,) = options
    values = literal_values(kind)
    if values:
        return "one of " + ", ".join(map(str, values))
    if get_origin(kind) is list:
        return f"a list, each item {describe_type(get_args(kind)[0])}"
    if dataclasses.is_dataclass(kind):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(get_origin(kind) or kind, "of a different type")


def convert(value: Any, hint: Any) -> Any:
    """Convert a value to the type of its field.

    Example:
        4.0 for `int` -> 4
        2026 for `str` -> "2026"
        "a" for `list[str]` -> ["a"]
        5 for `str | int` -> 5, as a type that the value already has comes first

    Args:
        value: The value that the user gave.
        hint: The type of the field.

    Raises:
        TypeError: If the field does not accept the value. The message says what it must be.
    """
    if value is None and types.NoneType in members(hint):
        return None
    options = sorted(_options(hint), key=lambda option: type(value) is not _class_of(option))
    for option in options:
        with contextlib.suppress(TypeError):
            return _convert_to_option(value, option)
    raise TypeError(f"must be {describe_type(hint)}")


def _class_of(option: Any) -> Any:
    """Return a type without its parameters: `list` for `list[str]`, and `int` for `int`."""
    return get_origin(option) or option


def _convert_to_option(value: Any, option: Any) -> Any:
    """Convert a value to one of the types that its field accepts, or raise a `TypeError` if it does not fit."""
    kind = _class_of(option)
    if kind is list and value is not None:
        return [convert(item, get_args(option)[0]) for item in as_list(value)]
    literals = literal_values(option)
    if literals:
        fits = value in literals
    else:
        fits = _fits(value, kind)
    if not fits:
        raise TypeError(f"must be {describe_type(option)}")
    if kind in (int, str) and not literals:
        return kind(value)
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value, which is not a list, can be converted to a class such as `int` or `dict`."""
    # For Python, True is a number as well.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return is_number and value == value // 1
    if kind is float:
        return is_number
    if kind is str:
        # `run_name: 2026` means text, although YAML reads a number.
        return is_number or isinstance(value, str)
    if kind is dict:
        # transformers parses a mapping that is written as JSON.
        return isinstance(value, dict) or (isinstance(value, str) and value.startswith("{"))
    if kind is list:
        return False
    # Neither YAML nor a text is an instance of a dataclass, such as accelerate's `ParallelismConfig`.
    return not dataclasses.is_dataclass(kind)
