"""Commands of tests, run in forks of a process that has imported the libraries, which saves seconds for each.

`tests/runner/test_warm.py` checks that a fork does what a new process does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from pipeline import safe_path
from pipeline.runner.processes import DEFAULTS, WarmProcess, run_command

ROOT = Path(__file__).parents[2]
RANKS = ["-m", "tests.helpers.ranks", "--config_file", "accelerate_config.yaml", "--num_processes"]
"""How a command begins that runs on several processes; their number comes next."""
BEFORE = {**os.environ, "PYTHONPATH": str(ROOT)}
"""The environment as it is before any test changes it: libraries read it when they are imported."""


class _Shared(WarmProcess):
    """A warm process for tests in several directories: its forks run in the one that is current."""

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], output: int | None
    ) -> bool:
        elsewhere = [*command[:2], "tests.helpers.elsewhere", os.getcwd(), *command[2:]]
        return super().fork(elsewhere, environment, descriptors, output)


@functools.cache
def warm_process() -> WarmProcess:
    """The process that all commands of the tests of this worker are forked from."""
    with contextlib.chdir(ROOT):
        process = _Shared(BEFORE)
    atexit.register(process.__exit__, None, None, None)
    return process


def run_forked(
    command: Sequence[str], directory: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` to its end.

    Args:
        command: The command; one with a PYTHONPATH of its own, which a fork would not see, runs in a new process.
        directory: Directory in which it runs.
        environment: Variables to set in addition to the environment of the tests.

    Returns:
        Its exit code, and everything that it wrote to stdout and stderr together, in both attributes.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    warm = warm_process() if environment["PYTHONPATH"] == str(ROOT) else None
    with tempfile.TemporaryFile("w+") as output, contextlib.chdir(directory):
        code, *_ = run_command(command, environment, (), output.fileno(), warm)
        output.seek(0)
        written = output.read()
    return subprocess.CompletedProcess(command, code, written, written)


class Started:
    """A command that is stopped at some moment: `python -m ...`, run in `ROOT` until this context ends.

    Args:
        command: The command.
        environment: What its environment has beside the one of the tests.

    Attributes:
        code: Its return code, as `subprocess` defines it, once it has ended.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        everything = {**DEFAULTS, **safe_path(), **os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self.code: int | None = None
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when this context ends
        output = self._output.fileno()
        self._process: WarmProcess | subprocess.Popen[bytes] = warm_process()
        with contextlib.chdir(ROOT):
            if not self._process.fork(command, everything, (), output):
                self._process = subprocess.Popen(command, env=everything, stdout=output, stderr=output)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.code is None:
            self.kill()
            self.wait()
        self._output.close()

    @property
    def is_running(self) -> bool:
        if isinstance(self._process, WarmProcess):
            return psutil.pid_exists(self._process.pid)
        return self._process.poll() is None

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            # The process may have ended.
            self._process.send_signal(number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it has ended. Return its code."""
        ended = self._process.wait()
        self.code = ended[0] if isinstance(ended, tuple) else ended
        return self.code

    def written(self) -> str:
        """Return all that it has written so far to stdout and stderr."""
        return os.pread(self._output.fileno(), 1 << 24, 0).decode()
