"""Mistakes of the user: told in one line each, all at once, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_USER_ERROR = 2
"""Exit code of a run refused because of its input (the convention of `argparse` and of POSIX shells)."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    Args:
        field: Argument, YAML key or file that is wrong, as the user writes it.
        value: What it holds.
        remedy: What to write or do instead, as a phrase.
    """

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return " ".join(f"{self.field}: {self.value}: {self.remedy}".split())


class UserError(Exception):
    """Everything that is wrong with the user's input, as far as it could be found out together.

    Args:
        *problems: At least one problem, in the order in which they are to be told.
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        # The default would rebuild the error from its message, which loses the problems between processes.
        return type(self), self.problems


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line a problem on stderr and exit code 2.

    Raises:
        SystemExit: With code 2, if the body raised `UserError`.
    """
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
