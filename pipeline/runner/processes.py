"""Run a step as a child process that receives the runner's signals, can save, and does not outlive the runner.

Importing torch, transformers and TRL takes seconds. So the runner starts this module as a warm process, which imports
them once and forks for each step. The fork runs the step's module as `python -m` would in a new process.

    runner                           warm process                       step
    WarmProcess.fork  -- request -->  main: os.fork()  -------------->  runs the module, writes to the runner's
                      <-- pid, handle --                                descriptors and holds its locks
    .send_signal      ------------------------------------------------> SIGINT, SIGTERM
    .wait        <-- code and memory --  wait4  <---------------------  ends

Forking is safe only while nothing else runs in the process. So the warm process never computes, which would start the
threads of OpenMP, and it ends if there is an accelerator, whose driver does not survive a fork, or a thread of Python.
The forkserver of multiprocessing goes on even if there are threads, and its forks do not run their exit functions.
"""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pkgutil import resolve_name
from types import FrameType
from typing import Any

import psutil

from pipeline import safe_path
from pipeline.errors import RunStopped, leave_closed_terminal, signal_with_parent, stop_signals
from pipeline.runner import launcher

DEFAULTS = {
    # TRL and the Hub client report their use otherwise.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    # Tokenizers warn when a process that has used threads forks.
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
"""Environment variables of a step, unless the user has set them."""

PRELOADED = (
    "accelerate.commands.launch", "pipeline.evaluation.stage", "pipeline.preferences.collect", "pipeline.report.page",
    "pipeline.rl.grpo", "pipeline.rl.ppo", "pipeline.training.train", "recipes", "trl:RewardTrainer", "trl:SFTTrainer",
)  # fmt: skip
"""What the steps import, as `pkgutil.resolve_name` takes it."""


class WarmProcess(contextlib.AbstractContextManager["WarmProcess"]):
    """The runner's side of a warm process, which ends with this context, and of the step that was forked last."""

    pid: int

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._channel, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), *PRELOADED],
                env={**DEFAULTS, **safe_path(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,
                preexec_fn=signal_with_parent(signal.SIGKILL),
            )
        self._is_ready: bool | None = None

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], output: int | None
    ) -> bool:
        """Run a command as `run` does, in a fork. Return whether that is possible."""
        if list(command[:2]) != [sys.executable, "-m"]:
            return False
        if self._is_ready is None:
            self._is_ready = _receive(self._channel) is not None
        if not self._is_ready:
            return False
        inherited = (1, 2, *descriptors) if output is None else (output, output, *descriptors)
        try:
            self._channel.send((command[2:], dict(environment), len(inherited)))
            for descriptor in inherited:
                send_handle(self._channel, descriptor, None)
        except OSError:
            # The warm process has ended since the last step.
            self._is_ready = False
            return False
        if (pid := _receive(self._channel)) is None:
            raise RunStopped("The process that steps are forked from has died; run the command again.")
        self.pid, self._handle = pid, recv_handle(self._channel)
        return True

    def send_signal(self, number: int) -> None:
        """Send the step a signal."""
        signal.pidfd_send_signal(self._handle, number)

    def wait(self) -> tuple[int, int]:
        """Wait until the step has ended. Return its code and peak memory, as `wait_measured` does."""
        # If the warm process dies, the kernel sends its step SIGTERM. Nobody learns what the step did then.
        code, peak = _receive(self._channel) or (-signal.SIGTERM, 0)
        select.select([self._handle], [], [])
        os.close(self._handle)
        return code, peak


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    output: int | None = None,
    warm: WarmProcess | None = None,
) -> tuple[int, signal.Signals | None, int]:
    """Run a command until it ends.

    The first SIGINT, SIGTERM or SIGHUP is forwarded to the child, which is then waited for. The second one kills the
    child and all its descendants, unless it is a SIGHUP, which a terminal that closes may send twice.

    Args:
        descriptors: File descriptors that the child inherits, to hold the lock on the run directory as well.
        output: File descriptor to which the child's stdout and stderr go; by default where the runner's own go.
        warm: Process from which the command is forked, if that is possible; by default it is a new process.

    Returns:
        The child's return code and peak memory in bytes, as `wait_measured` defines them, and between them the first
        signal that the runner received, or with whose code the child ended: a cluster signals what it has launched.
    """
    # The handler below stays in place until the child has ended, however often a signal comes.
    received: list[signal.Signals] = []
    process: subprocess.Popen[bytes] | WarmProcess | None = None

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
        if warm is not None and warm.fork(command, environment, descriptors, output):
            process = warm
        else:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C in a terminal would reach it twice otherwise.
                process_group=0,
                pass_fds=descriptors,
                # The step saves when the runner dies.
                preexec_fn=signal_with_parent(signal.SIGTERM) if sys.platform == "linux" else None,
            )
        # It came between installing the handlers and starting the child.
        if received:
            process.send_signal(received[0])
        if isinstance(process, WarmProcess):
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


def wait_measured(pid: int) -> tuple[int, int]:
    """Wait until a child has ended. Return its code as `subprocess` defines it, and its peak memory in bytes."""
    _, status, usage = os.wait4(pid, 0)
    # This is the largest process among the child and its descendants. Linux counts in KiB, macOS in bytes.
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _receive(channel: Connection) -> Any:
    """Return the next message, or None if the other side has ended."""
    with contextlib.suppress(EOFError, OSError):
        return channel.recv()
    return None


def main(argv: Sequence[str]) -> int:
    """Import `argv[1:]`, then fork for each request on the channel `argv[0]`; the fork runs the module of the step."""
    # The runner may have been started with these signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()
    for name in argv[1:]:
        resolve_name(name)
    torch = sys.modules.get("torch")
    if threading.active_count() > 1 or (torch is not None and torch.accelerator.is_available()):
        # At once, without waiting for threads.
        os._exit(1)
    # Kernels before 5.3 have no handles of processes. The error ends this process.
    os.close(os.pidfd_open(os.getpid()))
    # Collections in the forks do not touch, and thereby copy, what was imported.
    gc.collect()
    gc.freeze()

    channel, parent = Connection(int(argv[0])), os.getpid()
    signal_step = signal_with_parent(signal.SIGTERM)
    channel.send("ready")
    while request := _receive(channel):
        (module, *arguments), environment, number = request
        descriptors = [recv_handle(channel) for _ in range(number)]
        pid = os.fork()
        if pid == 0:
            break
        # The locks among them would otherwise outlive the step.
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(pid)
        handle = os.pidfd_open(pid)
        send_handle(channel, handle, None)
        os.close(handle)
        channel.send(wait_measured(pid))
    else:
        return 0

    # This is the fork.
    channel.close()
    os.setpgid(0, 0)
    signal_step()
    # If the warm process died before the kernel was asked to signal that, nobody else will.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
    for source, target in zip(descriptors, (1, 2), strict=False):
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(environment)
    gc.enable()
    if module == launcher.__name__:
        return launcher.main(arguments, forked=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
