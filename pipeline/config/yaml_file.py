"""Read the YAML files of recipes."""

from __future__ import annotations

import os
import re
from typing import Any

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
        # An alias expands to the value that it refers to, so that nine lines of aliases of aliases make 8^9 values.
        # No limit on the size of the file prevents that: the values are counted before they are made.
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
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML raises a ValueError for a date or a number that cannot be one.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(Problem("--config", where, f"is not valid YAML ({what}); correct it")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--config", path, "must consist of `field: value` lines")) from None
    return content
