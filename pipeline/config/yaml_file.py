"""Read YAML files, and convert their values to the types of the fields that they set."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import types
from collections.abc import Iterable
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from pipeline.errors import Problem, UserError

MAX_BYTES = 1 << 20
"""A file of this size or more is certainly not a recipe's."""

TYPES = ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp")
"""Types of YAML that are read. Others are sets, pairs and bytes, and objects of Python; the check of a field reports a
date, which may be a text without its quotes."""

MAX_NODES, MAX_DEPTH = 10_000, 20
"""Limits on the values in a file, with every alias expanded, and on their nesting."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 that reads `1e-4` as a number (without a dot it would be a string) and refuses duplicate keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(event, f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        name = node.tag.rpartition(":")[2] if node else ""
        if node and node.tag not in [f"tag:yaml.org,2002:{known}" for known in TYPES]:
            self._refuse(event, f"a value of the type {name}; write text in quotes")
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        if isinstance(event, yaml.AliasEvent) and id(node) not in self._sizes:
            self._refuse(event, "an alias inside the value that it refers to")
        self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
        if self._sizes[id(node)] > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES:,} values")
        return node

    def _refuse(self, at: Any, why: str) -> None:
        raise yaml.constructor.ConstructorError(None, None, why, at.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key must be a name")
            if key.value in seen:
                self._refuse(key, f"duplicate key {key.value!r}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a recipe's YAML file.

    Args:
        path: File that contains one mapping from field names to values.

    Returns:
        The mapping.

    Raises:
        UserError: If the file cannot be read, is not valid YAML, or does not contain a mapping.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not path.startswith("/dev/fd/"):
            kind = "a directory" if os.path.isdir(path) else "not a regular file"
            raise UserError(Problem("--config", path, f"cannot be read (it is {kind}); give a YAML file"))
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES)
        if len(text) == MAX_BYTES:
            raise UserError(Problem("--config", path, "is larger than 1 MB; give the YAML file of a recipe"))
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(Problem("--config", path, f"cannot be read ({error.strerror}); give a YAML file")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("--config", path, "is not UTF-8 text; give a YAML file")) from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for a date or a number that cannot be one
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(Problem("--config", where, f"is not valid YAML ({what}); correct it")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--config", path, "must consist of `field: value` lines")) from None
    return content


def unknown_field(name: str, value: object, known: Iterable[str]) -> Problem:
    """Return the problem of a field that no dataclass has, with the nearest name as a suggestion."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    remedy = f"unknown field; did you mean `{nearest[0]}`?" if nearest else "unknown field; see --help for those known"
    return Problem(name, value, remedy)


def describe_type(hint: Any) -> str:
    """Return a type in words, to follow "must be"."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(option) for option in _options(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(option.value) for option in hint)
    if get_origin(hint) is list:
        return f"a list, each item {describe_type(get_args(hint)[0])}"
    if is_dataclass(hint):
        return "null"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names.get(get_origin(hint) or hint, "of a different type")


def _options(union: Any) -> list[Any]:
    """Return the members of a union, without `None` and without `str` where that only stands for an enumeration."""
    members = [member for member in get_args(union) if member is not type(None)]
    named = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return [member for member in members if not (named and member is str)]


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from YAML to the type of its field (1 to 1.0, one item to a list of one).

    Raises:
        TypeError: If it has a different type.
    """
    origin = get_origin(hint) or hint
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        bool: isinstance(value, bool),
        int: number and value == value // 1,
        float: number,
        str: number or isinstance(value, str),  # `run_name: 2026` means text, whatever YAML takes it for
        dict: isinstance(value, dict) or (isinstance(value, str) and value.startswith("{")),
    }
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        # An exact match first: for `int | str`, 5 stays a number.
        for option in sorted(_options(hint), key=lambda option: type(value) is not (get_origin(option) or option)):
            with contextlib.suppress(TypeError):
                return convert(value, option)
    elif origin is list:
        if value is not None:
            return [convert(item, get_args(hint)[0]) for item in (value if isinstance(value, list) else [value])]
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif isinstance(origin, type) and issubclass(origin, Enum):
        if value in [option.value for option in origin]:
            return value
    # Neither YAML nor a text is an instance of a dataclass, such as accelerate's `ParallelismConfig`.
    elif fits.get(origin, not is_dataclass(origin)):
        return origin(value) if origin in (int, str) else value
    raise TypeError(f"must be {describe_type(hint)}")
