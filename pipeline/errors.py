"""What ends a run early: mistakes of the user, told in one line each, and stops whose reason is known."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_USER_ERROR = 2
"""Exit code of a run refused because of its input (the convention of `argparse` and of POSIX shells)."""

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT, the convention of POSIX shells)."""

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{6,}")
"""A token of the Hub, which no message repeats."""


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
        return TOKEN.sub("hf_***", " ".join(f"{self.field}: {self.value}: {self.remedy}".split()))


class UserError(Exception):
    """Everything that is wrong with the user's input, as far as it could be found out together.

    Args:
        *problems: At least one problem, in the order in which they are to be told; each is told once.
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        super().__init__("\n".join(str(problem) for problem in problems))

    def __reduce__(self) -> tuple[type[UserError], tuple[Problem, ...]]:
        # The default would rebuild the error from its message, which loses the problems between processes.
        return type(self), self.problems


class RunStopped(Exception):
    """A run that cannot or shall not go on, for a reason that is known and not the input's.

    Args:
        message: What happened and how to go on, for the user.
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
    """Turn a `UserError`, a `RunStopped` and Ctrl-C into a message on stderr and an exit code, without a
    traceback. While a run is being prepared, errors of the libraries that speak of a field are the user's, too.

    Raises:
        SystemExit: With code 2 after `UserError` (one line a problem), with its own code after `RunStopped`,
            with 130 after Ctrl-C.
    """
    from pipeline import preparation  # which imports this module

    # Several processes of one machine find the same mistakes; one tells them.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    preparation.end()
    try:
        try:
            yield
        except (UserError, RunStopped):
            raise
        except Exception as error:
            refusal = preparation.explain(error)
            if refusal is None:
                raise
            raise refusal from error
    except UserError as error:
        preparation.undo()
        if first:
            for problem in error.problems:
                print(problem, file=sys.stderr)
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
        preparation.end()
