"""Read the YAML files of recipes, which may come from strangers."""

import os
import re
from typing import Any

import yaml

from pipeline.errors import Problem, UserError

MAX_CHARACTERS = 1 << 20
"""A recipe has some thousand characters. Reading stops here, in case the path names a model or an endless device."""


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.1 that reads `1e-4` as a number, and rejects duplicate keys and nested aliases.

    In YAML 1.1, a number with an exponent needs a dot, and `1e-4` would be text. Of duplicate keys, PyYAML would use
    the last one.

    An anchor (`&name`) gives a value a name, and an alias (`*name`) repeats it. An alias inside a value with an anchor
    is rejected: nine lines of aliases of aliases could expand to 8^9 values.
    """

    # The number of values with an anchor that contain the value that is being read.
    _anchors = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
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
    """Return the values in a recipe's YAML file, by field.

    Raises:
        UserError: If the file cannot be read, or is not a mapping from fields to values.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path) and not path.startswith("/dev/fd/"):
            kind = "a directory" if os.path.isdir(path) else "not a regular file"
            raise UserError(Problem("--config", path, f"cannot be read (it is {kind}); give a YAML file"))
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
        if len(text) == MAX_CHARACTERS:
            raise UserError(Problem("--config", path, "is larger than 1 MB; give the YAML file of a recipe"))
        content = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(Problem("--config", path, f"cannot be read ({error.strerror}); give a YAML file")) from None
    except UnicodeDecodeError:
        raise UserError(Problem("--config", path, "is not UTF-8 text; give a YAML file")) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # PyYAML raises a `ValueError` for a date such as 2026-13-01. Its own errors have a place (`problem_mark`) and a
        # message: `reason` for a character that YAML does not allow, and `problem` for everything else.
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(Problem("--config", where, f"is not valid YAML ({what}); correct it")) from None
    if not isinstance(content, dict):
        raise UserError(Problem("--config", path, "must consist of `field: value` lines"))
    return content
