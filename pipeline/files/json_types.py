"""Whether JSON from a file has the types that its readers expect; the file may be damaged, or come from a stranger."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

_NAMES: dict[Any, str] = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
    type(None): "null",
}
_LARGEST = 1e100
"""Differences and squares of larger numbers would overflow."""


def with_right_types(content: Mapping[str, Any], expected: Any, path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the content of a file without the entries that have another type than expected, and those that are null.

    Args:
        content: The JSON object in the file.
        expected: A `TypedDict`. It need not have all keys: entries with other keys are kept.
        path: The file, for the notes.
        notes: A line is appended for each entry that is left out, unless it is null.
    """
    entries = {}
    for key, value in content.items():
        fault = wrong_type(value, _hints(expected).get(key, Any), key)
        if value is None:
            continue
        if fault:
            notes.append(f"{path}: {fault}; skipped")
        else:
            entries[key] = value
    return entries


def wrong_type(value: Any, expected: Any, place: str) -> str:
    """Return where a JSON value has another type than expected, or "" if it does not.

    Example:
        wrong_type([{"prompt": 1}], list[Answer], "answers") -> "answers[0].prompt is not a text"

    Args:
        value: The value.
        expected: `Any`, `str`, `int`, `float`, `bool`, `None`, a `TypedDict`, or a list, dict or union of these. A
            number is finite, and smaller than 1e100.
        place: What the value is called.
    """
    if expected is Any:
        return ""
    origin = get_origin(expected) or expected
    arguments = get_args(expected)
    if origin in (UnionType, Union):
        faults = [wrong_type(value, argument, place) for argument in arguments]
        return "" if "" in faults else faults[0]
    if is_typeddict(origin):
        return _wrong_entry(value, origin, place)
    if not _is_instance(value, origin):
        return f"{place} is not {_NAMES[origin]}"
    inner: list[str] = []
    if origin is list and arguments:
        inner = [wrong_type(item, arguments[0], f"{place}[{index}]") for index, item in enumerate(value)]
    elif origin is dict and arguments:
        inner = [wrong_type(item, arguments[1], f"{place}.{key}") for key, item in value.items()]
    return next(filter(None, inner), "")


def _wrong_entry(value: Any, expected: Any, place: str) -> str:
    """Return as `wrong_type` does what is wrong with a value that should be a `TypedDict`."""
    if not isinstance(value, dict):
        return f"{place} is not an object"
    for key, hint in _hints(expected).items():
        fault = ""
        if key in value:
            fault = wrong_type(value[key], hint, f"{place}.{key}")
        elif key in expected.__required_keys__:
            fault = f"{place}.{key} is missing"
        if fault:
            return fault
    return ""


def _is_instance(value: Any, expected: Any) -> bool:
    """Return whether a JSON value is of a type, where true and false are no numbers, and whole numbers are numbers."""
    if expected is None:
        return value is None
    if expected not in (int, float):
        return isinstance(value, expected)
    if isinstance(value, bool) or not isinstance(value, int | expected):
        return False
    return abs(value) < _LARGEST and not math.isnan(value)


@cache
def _hints(expected: Any) -> dict[str, Any]:
    """Return the type of each key of a `TypedDict`."""
    return get_type_hints(expected)
