"""How a program ends early: user errors, reported in one line each, and stops for a known reason.

While a run is being prepared, from its arguments to its first step, the libraries reject what only they can judge: a
trainer's constructor raises one error at a time, with a traceback. An error that names a field, or the value that the
user gave it, is then reported as that field's problem; any other is a defect and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_USER_ERROR = 2
"""Exit code of a run refused because of its input (the convention of `argparse` and of POSIX shells)."""

EXIT_PUSH_FAILED = 3
"""Exit code of a run that is complete on this disk, but could not be pushed to the Hub."""

EXIT_WAITING = 4
"""Exit code of a step that waits for people."""

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT, the convention of POSIX shells)."""

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{6,}")
"""A token of the Hub, which no message repeats."""

LIBRARY_ERRORS = (
    ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError, OSError, ArithmeticError,
    AssertionError,
)  # fmt: skip
"""Exceptions that the libraries raise for options and configurations that they cannot use."""

LONGEST_VALUE = 300
"""Characters of a value that a message repeats."""

SHORTEST_NAME = 4
"""Characters that a value must have so that finding it in an error message is not a coincidence."""

HUB_UNREACHABLE = (
    "is not a local path, and the Hub cannot be reached; check the network (and HF_HUB_OFFLINE) or give a local path"
)
"""Remedy for a name on the Hub while the Hub does not answer."""

NETWORK_ERRORS = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout"}
"""Errors of the Hub's client that come from the network, by the names of their classes."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the user's input.

    Attributes:
        field: Argument, YAML key or file that is wrong, as the user writes it.
        value: Its value.
        remedy: What to write or do instead, as a phrase.
    """

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        value = str(self.value)
        value = value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}..."
        return TOKEN.sub("hf_***", " ".join(f"{self.field}: {value}: {self.remedy}".split()))


class UserError(Exception):
    """Everything that is wrong with the user's input, as far as it could be found together.

    Args:
        *problems: At least one problem, in the order of the report; duplicates are dropped.
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        # The default would rebuild the error from its message, which loses the problems between processes.
        return type(self), self.problems


class RunStopped(Exception):
    """A run that cannot or should not continue, for a known reason that is not its input.

    Args:
        message: What happened and how to resume, for the user.
        exit_code: Exit code of the process.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.message = message
        self.exit_code = exit_code
        super().__init__(message, exit_code)

    def __str__(self) -> str:
        return self.message


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a `RunStopped` and Ctrl-C into a message on stderr and an exit code, without a traceback.

    While a run is being prepared, errors of the libraries that name a field are user errors as well.

    Raises:
        SystemExit: With code 2 after a `UserError` (one line per problem), with its own code after a `RunStopped`, with
            130 after Ctrl-C.
    """
    # Several processes of one machine find the same mistakes; one reports them.
    first = os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    end_preparation()
    try:
        try:
            yield
        except (UserError, RunStopped):
            raise
        except Exception as error:
            if refusal := explain_library_error(error):
                raise refusal from error
            raise
    except UserError as error:
        remove_new_directories()
        if first:
            print(*error.problems, sep="\n", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except RunStopped as stop:
        if first or stop.exit_code == 1:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        if first:
            print("Interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    finally:
        end_preparation()


@dataclass(frozen=True)
class _Preparation:
    asked: Mapping[str, Any]
    known: frozenset[str]
    missing_directories: tuple[Path, ...]


_current: _Preparation | None = None


def begin_preparation(asked: Mapping[str, Any], known: Iterable[str], output_dir: str | None) -> None:
    """Treat errors of the libraries that name a field as user errors, until `end_preparation`.

    Args:
        asked: Values that the user gave, by field.
        known: All fields.
        output_dir: Where the run will write.
    """
    global _current
    path = Path(output_dir or ".").absolute()
    missing = tuple(folder for folder in (path, *path.parents) if not folder.exists())
    _current = _Preparation(dict(asked), frozenset(known), missing)


def end_preparation() -> None:
    """Treat errors of the libraries as defects again: the first step begins, or the program ends."""
    global _current
    _current = None


def explain_library_error(error: Exception) -> UserError | None:
    """Return the user error behind a library's error; None if it names no field, or no run is being prepared."""
    if _current is None:
        return None
    message = " ".join(str(error).split())
    name = field_named_in(message, _current.asked)
    if name is None:
        others = sorted(other for other in _current.known if "_" in other)
        name = next((other for other in others if re.search(rf"\b{re.escape(other)}\b", message)), None)
    return UserError(Problem(name, _current.asked.get(name, "not given"), message)) if name else None


def remove_new_directories() -> None:
    """Remove the output directory that a constructor has created for a run that is refused."""
    for folder in _current.missing_directories if _current is not None else ():
        with contextlib.suppress(OSError):  # others wrote there meanwhile
            folder.rmdir()


def field_named_in(message: str, values: Mapping[str, Any]) -> str | None:
    """Return the field that an error message mentions, by its name or by its value."""
    for separator in ("_", " "):
        for name in values:
            if re.search(rf"\b{re.escape(name.replace('_', separator))}\b", message):
                return name
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            named = isinstance(item, str) and len(item) >= SHORTEST_NAME
            if named and re.search(rf"(?<!\w){re.escape(item)}(?!\w)", message, re.IGNORECASE):
                return name
    return None


def is_network_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that the Hub cannot be reached."""
    while error is not None:
        if type(error).__name__ in NETWORK_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False
