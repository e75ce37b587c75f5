"""Read the YAML files of recipes."""

import os
import re
from typing import Any

import yaml

from pipeline.errors import Problem, UserError

MAX_BYTES = 1 << 20
"""A file of this size or more cannot be a recipe."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 that reads `1e-4` as a number (without a dot it would be a string) and rejects duplicate keys."""

    # How many of the values that are being read have an anchor.
    _anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        # In a file of somebody else, nine lines of aliases of aliases could expand to 8^9 values.
        if is_alias and self._anchors:
            raise yaml.composer.ComposerError(None, None, "an alias inside a value with an anchor", event.start_mark)
        if is_alias or event.anchor is None:
            return super().compose_node(parent, index)
        self._anchors += 1
        node = super().compose_node(parent, index)
        self._anchors -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the mapping from fields to values in a recipe's YAML file; raise a `UserError` if it does not hold one."""
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML raises a ValueError for a date or a number that cannot be one.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(Problem("--config", where, f"is not valid YAML ({what}); correct it")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--config", path, "must consist of `field: value` lines")) from None
    return content
