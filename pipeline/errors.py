"""How a program ends early: user errors, reported in one line each, and stops for a known reason.

Mistakes of the user are found by checks, or by the constructor or loader that gets a field, and are reported with that
field. Any other exception is a defect of this project or of a library, and keeps its traceback.
"""

import ctypes
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

EXIT_USER_ERROR = 2
"""Exit code for invalid input, as in `argparse` and shells."""
EXIT_PUSH_FAILED = 3
"""Exit code of a step that is complete, but not on the Hub."""
EXIT_WAITING = 4
"""Exit code of a step that waits for people."""
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_jwt_[\w.-]*\w|(?:hf_(?:oauth_+)?|api_org_)[A-Za-z0-9]{6,})")
"""A Hub token, which messages must not contain."""
LIBRARY_ERRORS = (
    ValueError, TypeError, LookupError, RuntimeError, AttributeError, ImportError, OSError, ArithmeticError,
    AssertionError,
)  # fmt: skip
"""Exceptions that the libraries raise for options and configurations that they cannot use."""
HUB_UNREACHABLE = (
    "is not a local path, and the Hub cannot be reached; check the network (and HF_HUB_OFFLINE) or give a local path"
)
"""Remedy for a name on the Hub while the Hub does not answer."""


@dataclass(frozen=True)
class Problem:
    """An argument, YAML key or file that is wrong, its value, and what to write or do instead, as a phrase."""

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        value = str(self.value)
        if len(value) > 300:
            value = f"{value[:300]}..."
        line = " ".join(f"{self.field}: {value}: {self.remedy}".split())
        return "".join(map(_printable, TOKEN.sub("hf_***", line)))


def _printable(character: str) -> str:
    """Return a character, or an escape for a control code.

    Otherwise, a downloaded recipe could send control codes to the terminal, to hide lines or change its title.
    """
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


class UserError(Exception):
    """Everything that is wrong with the user's input: at least one problem; duplicates are dropped."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = tuple({str(problem): problem for problem in problems}.values())
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def refuse(*problems: Problem | None) -> None:
    """Raise a `UserError` with the problems, if there are any; None stands for a check without a problem."""
    present = [problem for problem in problems if problem is not None]
    if present:
        raise UserError(*present)


def refuse_values(*problems: Problem) -> None:
    """Raise a `ValueError` with the problems, if there are any, as constructors of the libraries' arguments do."""
    if problems:
        error = UserError(*problems)
        raise ValueError(str(error)) from error


class RunStopped(Exception):
    """A run that cannot or should not continue for a known reason; the message says how to resume."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def as_typed(*words: object) -> str:
    """Return a command as the user types it: with `fourstage`, `./fourstage` or `python -m pipeline`."""
    if Path(sys.argv[0]).parts[-2:] == ("pipeline", "__main__.py"):
        return shlex.join(["python", "-m", "pipeline", *map(str, words)])
    # The script `fourstage` of a clone says how it was called, and reads the name of its environment from a variable.
    script = os.environ.get("FOURSTAGE_COMMAND")
    venv = os.environ.get("FOURSTAGE_VENV")
    command = shlex.join([script or "fourstage", *map(str, words)])
    if script and venv:
        return f"FOURSTAGE_VENV={shlex.quote(venv)} {command}"
    return command


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError`, a `RunStopped` and Ctrl-C into a message on stderr and an exit code, without a traceback."""
    try:
        yield
        return
    except UserError as error:
        message = str(error)
        code = EXIT_USER_ERROR
    except RunStopped as stop:
        message = str(stop)
        code = stop.exit_code
    except KeyboardInterrupt:
        message = "Interrupted."
        # POSIX shells use this convention.
        code = 128 + signal.SIGINT
    # Several processes of one machine find the same mistakes; one reports them.
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        print(message, file=sys.stderr)
    sys.exit(code)


def signal_with_parent(number: signal.Signals) -> Callable[[], object]:
    """Return a function by which a Linux process asks to be signalled when its parent dies."""
    # PR_SET_PDEATHSIG, as <linux/prctl.h> has it.
    return partial(ctypes.CDLL(None).prctl, 1, number)


def stop_signals() -> list[signal.Signals]:
    """Return the signals after which a run saves and ends: Ctrl-C, a cluster's SIGTERM, a terminal that closes."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # A run under `nohup` ignores a terminal that closes, and continues.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextmanager
def collect(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of a `UserError` in this block to `problems`, and continue after the block."""
    try:
        yield
    except UserError as error:
        problems += error.problems


@contextmanager
def problems_of(part: str) -> Iterator[None]:
    """Prefix the fields of problems in this block with the part of the input that they are about, such as a step."""
    try:
        yield
    except UserError as error:
        problems = [replace(problem, field=f"{part}: {problem.field}") for problem in error.problems]
        raise UserError(*problems) from None


def leave_closed_terminal() -> None:
    """Send output to the null device if the terminal was closed; may be called in a signal handler."""
    for descriptor in (1, 2):
        try:
            os.get_terminal_size(descriptor)
        except OSError as error:
            # A file or a pipe fails with ENOTTY instead.
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def causes(error: BaseException | None, *, context: bool = False) -> Iterator[BaseException]:
    """Yield an error, the error that caused it (`raise ... from`), and so on.

    With `context`, an error without a cause is also traced to the error that was being handled when it was raised.
    """
    while error is not None:
        yield error
        if context:
            error = error.__cause__ or error.__context__
        else:
            error = error.__cause__


def is_network_error(error: BaseException | None) -> bool:
    """Return whether an error, or one that led to it, says that the Hub cannot be reached."""
    names = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectTimeout", "ReadTimeout"}
    return any(type(cause).__name__ in names for cause in causes(error, context=True))
