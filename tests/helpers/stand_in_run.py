"""`fourstage run` with stand-ins for its steps, in forks of a process that has imported what a run imports.

A new process spends six seconds on imports, and then a quarter of a second on four stand-ins.
"""

import fcntl
import io
import multiprocessing
import os
import signal
import sys
import termios
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from pipeline.__main__ import main
from pipeline.runner import console, processes
from pipeline.stages import STAGES

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*processes.PRELOADED])


def replace_steps() -> None:
    """Make every step of a run the stand-in, which is not evaluated, in this process."""
    for name, kind in STAGES.items():
        if kind.module:
            STAGES[name] = replace(kind, module="tests.helpers.stand_in_step", launched=False, measured=False)
    processes.PRELOADED = ()
    console.PROGRESS_SECONDS = 0


def start(*argv: str, environment: Mapping[str, str], terminal: str | None = None) -> BaseProcess:
    """Start `fourstage run` in the current directory.

    Args:
        *argv: Arguments.
        environment: Its environment, whole.
        terminal: Path of the terminal that it runs in; by default it writes to the files `out` and `err`.

    Returns:
        Its process.
    """
    process = CONTEXT.Process(target=_run, args=(argv, Path.cwd(), dict(environment), terminal), daemon=True)
    process.start()
    return process


def end(process: BaseProcess) -> int:
    """Wait until a run has ended. Return its exit code."""
    process.join(timeout=60)
    assert process.exitcode is not None, "it goes on"
    return process.exitcode


def _run(argv: tuple[str, ...], directory: Path, environment: Mapping[str, str], terminal: str | None) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    if terminal is None:
        paths = (os.devnull, "out", "err")
        streams = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for path in paths]
    else:
        os.setsid()
        # These tests may run under `nohup`, which a run obeys.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        streams = [os.open(terminal, os.O_RDWR)] * 3
        # Ctrl-C reaches the process whose terminal this is.
        fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in {*streams}:
        os.close(stream)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding, write_through=True) for number in (1, 2)
    )
    replace_steps()
    sys.exit(main(["run", *argv]))
