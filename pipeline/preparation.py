"""The time from the arguments to the first step, in which the libraries refuse what only they can judge.

A trainer's constructor finds out, one mistake at a time and with a traceback, what no check of ours knows of. An
error that speaks of a field, by its name or by the value that the user gave it, is told as that field's problem;
any other is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, UserError

SHORTEST_NAME = 4
"""Characters from which on a value in an error message is not there by chance."""


@dataclass(frozen=True)
class _Run:
    asked: Mapping[str, Any]
    known: frozenset[str]
    missing_directories: tuple[Path, ...]


_current: _Run | None = None


def begin(asked: Mapping[str, Any], known: Iterable[str], output_dir: str | None) -> None:
    """A run is being prepared from here on.

    Args:
        asked: What the user gave, by field.
        known: All fields.
        output_dir: Where the run will write.
    """
    global _current
    path = Path(output_dir or ".").absolute()
    missing = tuple(folder for folder in (path, *path.parents) if not folder.exists())
    _current = _Run(dict(asked), frozenset(known), missing)


def end() -> None:
    """The first step is about to be taken, or the program ends: errors are no longer the input's."""
    global _current
    _current = None


def explain(error: Exception) -> UserError | None:
    """The user's mistake that a library's error tells of; `None` if it is none, or if nothing is being prepared."""
    if _current is None:
        return None
    message = " ".join(str(error).split())
    name = field_in(message, _current.asked)
    if name is None and "api/repos" in message and _current.asked.get("push_to_hub"):
        name = "push_to_hub"
    if name is None:
        others = sorted(other for other in _current.known if "_" in other)
        name = next((other for other in others if re.search(rf"\b{re.escape(other)}\b", message)), None)
    if name is None:
        return None
    return UserError(Problem(name, _current.asked.get(name, "not given"), message))


def undo() -> None:
    """Remove the output directory that a constructor has made for a run that is refused."""
    for folder in _current.missing_directories if _current is not None else ():
        with contextlib.suppress(OSError):  # others wrote there meanwhile
            folder.rmdir()


def field_in(message: str, values: Mapping[str, Any]) -> str | None:
    """The field that an error message speaks of, by its name or else by its value."""
    for between in ("_", " "):
        for name in values:
            if re.search(rf"\b{re.escape(name.replace('_', between))}\b", message):
                return name
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            named = isinstance(item, str) and len(item) >= SHORTEST_NAME
            if named and re.search(rf"(?<!\w){re.escape(item)}(?!\w)", message, re.IGNORECASE):
                return name
    return None
