"""Values of a YAML file, checked against the types of the fields that they are for."""

from __future__ import annotations

import re
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from pipeline.errors import Problem, UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `1e-4` a number (without a dot it would be a string), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands there twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a recipe's YAML file.

    Args:
        path: File that holds one mapping from field names to values.

    Returns:
        The mapping.

    Raises:
        UserError: If the file isn't there, is no YAML, or is no mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise UserError(Problem("--config", path, f"cannot be read ({error.strerror}); give a YAML file")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("--config", path, "is not text in UTF-8; give a YAML file")) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(Problem("--config", where, f"is not valid YAML ({what}); correct that line")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--config", path, "must hold `field: value` lines")) from None
    return content


def describe(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(option.value) for option in hint)
    if get_origin(hint) is list:
        return f"a list, each item {describe(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(get_origin(hint) or hint, "of another type")


def _options(union: Any) -> list[Any]:
    """Members of a union without `None`, and without text where it stands for the names of an enumeration."""
    members = [member for member in get_args(union) if member is not type(None)]
    named = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return [member for member in members if not (named and member is str)]


def convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """Check a value from YAML against a field's type.

    Returns:
        Whether it fits, and the value as the field takes it (1 as 1.0, one item as a list of one).
    """
    origin = get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        options = _options(hint)
        if value is None:
            return type(None) in get_args(hint), None
        # An exact match first: for `int | str`, 5 stays a number.
        for option in sorted(options, key=lambda option: type(value) is not (get_origin(option) or option)):
            fits, converted = convert(value, option)
            if fits:
                return True, converted
        return False, value
    if origin is Literal:
        return value in get_args(hint), value
    if origin is list:
        items = value if isinstance(value, list) else [value]
        pairs = [convert(item, get_args(hint)[0]) for item in items]
        return value is not None and all(fits for fits, _ in pairs), [item for _, item in pairs]
    if origin is bool:
        return isinstance(value, bool), value
    if origin is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        return (True, int(value)) if isinstance(value, float) and value.is_integer() else (fits, value)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool), value
    if origin is str:
        # `run_name: 2026` means text, whatever YAML takes it for.
        fits = isinstance(value, str | int | float) and not isinstance(value, bool)
        return fits, str(value) if fits else value
    if origin is dict:
        return isinstance(value, dict) or (isinstance(value, str) and value.startswith("{")), value
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value in [option.value for option in origin], value
    return True, value
