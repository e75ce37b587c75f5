"""Commands of tests, run in forks of a process that has imported the libraries, which saves seconds for each.

That a fork does what a new process does is held by `tests/runner/test_warm.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.runner.processes import run
from pipeline.runner.warm import WarmProcess

ROOT = Path(__file__).parents[1]


@functools.cache
def _warm(directory: Path) -> WarmProcess:
    with contextlib.chdir(directory):
        process = WarmProcess({**os.environ, "PYTHONPATH": str(ROOT)})
    atexit.register(process.__exit__, None, None, None)
    return process


def run_forked(
    command: Sequence[str], directory: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ...` to its end.

    Args:
        command: The command; one with a PYTHONPATH of its own, which a fork would not see, runs in a new process.
        directory: Directory in which it runs.
        environment: What its environment has beside the one of the tests.

    Returns:
        Its code; as stdout and as stderr all that it wrote to both.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    warm = _warm(directory) if environment["PYTHONPATH"] == str(ROOT) else None
    with tempfile.TemporaryFile("w+") as output, contextlib.chdir(directory):
        code, *_ = run(command, environment, (), output.fileno(), warm)
        output.seek(0)
        written = output.read()
    return subprocess.CompletedProcess(command, code, written, written)
