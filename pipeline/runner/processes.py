"""Run a step as a child process that receives the runner's signals, can save, and does not outlive the runner."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

import psutil

from pipeline import safe_path
from pipeline.errors import leave_closed_terminal, signal_with_parent, stop_signals
from pipeline.runner.warm import DEFAULTS, Fork, WarmProcess, wait_measured


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    output: int | None = None,
    warm: WarmProcess | None = None,
) -> tuple[int, signal.Signals | None, int]:
    """Run a command until it ends.

    The first SIGINT, SIGTERM or SIGHUP is forwarded to the child, which is then waited for. The second one kills the
    child and all its descendants, unless it is a SIGHUP, which a terminal that closes may send twice. The child gets a
    process group of its own, or Ctrl-C in a terminal would reach it twice.

    Args:
        environment: Environment of the child, to which `DEFAULTS` are added.
        descriptors: File descriptors that the child inherits, to hold the lock on the run directory as well.
        output: File descriptor to which the child's stdout and stderr go; by default where the runner's own go.
        warm: Process from which the command is forked, if that is possible; by default it is a new process.

    Returns:
        The child's return code and peak memory in bytes, as `wait_measured` defines them, and between them the first
        signal that the runner received, or with whose code the child ended: a cluster signals what it has launched.
    """
    # The handler below stays in place until the child has ended, however often a signal comes.
    received: list[signal.Signals] = []
    process: subprocess.Popen[bytes] | Fork | None = None

    def forward_signal(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        leave_closed_terminal()
        if process is None or (len(received) > 1 and received[-1].name == "SIGHUP"):
            return
        if len(received) > 1:
            # The user does not want to wait until it has saved. A launcher's workers have sessions of their own.
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(process.pid)
                for descendant in [*top.children(recursive=True), top]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        descendant.kill()
        else:
            process.send_signal(number)

    environment = {**DEFAULTS, **safe_path(), **environment}
    before = {number: signal.signal(number, forward_signal) for number in stop_signals()}
    try:
        process = warm.fork(command, environment, descriptors, output) if warm is not None else None
        if process is None:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                pass_fds=descriptors,
                # The step saves when the runner dies.
                preexec_fn=signal_with_parent(signal.SIGTERM) if sys.platform == "linux" else None,
            )
        # A signal may come between installing the handlers and starting the child.
        if received:
            process.send_signal(received[0])
        if isinstance(process, Fork):
            code, peak = process.wait()
        else:
            try:
                code, peak = wait_measured(process.pid)
                process.returncode = code
            except ChildProcessError:
                # A signal that came as the process ended made `Popen.send_signal` collect its code.
                code, peak = process.wait(), 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stopped = next((number for number in before if code == 128 + number), None)
    return code, received[0] if received else stopped, peak
