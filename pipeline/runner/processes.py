"""Run a step as a child process that gets the runner's signals, can save, and does not outlive the runner.

Importing torch, transformers and TRL takes seconds. So the runner starts this module as a warm process that imports
them once and forks for each step. The fork runs the step's module as `python -m` would in a new process.

    runner                           warm process                       step
    WarmProcess.fork  -- request -->  main: os.fork()  -------------->  runs the module, writes to the runner's
                      <-- pid, handle --                                descriptors and holds its locks
    .send_signal      ------------------------------------------------> SIGINT, SIGTERM
    .wait        <-- code and memory --  wait4  <---------------------  ends

Forking is only safe while nothing else runs in the process. So the warm process never computes, which would start
OpenMP threads, and it ends if there is an accelerator, whose driver does not survive a fork, or a Python thread. The
forkserver of multiprocessing would continue despite threads, and its forks do not run exit functions.
"""

import atexit
import contextlib
import gc
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from io import BufferedRandom, BufferedWriter, FileIO, TextIOWrapper
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle
from pkgutil import resolve_name
from types import FrameType
from typing import Any, NoReturn

import psutil

from pipeline import safe_path
from pipeline.errors import RunStopped, leave_closed_terminal, signal_with_parent, stop_signals
from pipeline.runner import launcher

DEFAULTS = {
    # Otherwise, TRL and the Hub client send telemetry.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    # Tokenizers would warn when a process that has used threads forks.
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
"""Environment variables of a step, unless the user has set them."""

PRELOADED = (
    "accelerate.commands.launch", "pipeline.evaluation.stage", "pipeline.preferences.collect", "pipeline.report.page",
    "pipeline.rl.grpo", "pipeline.rl.ppo", "pipeline.training.fine_tuning", "pipeline.training.inputs",
    "pipeline.training.train", "recipes",
)  # fmt: skip
"""The steps' imports, as names for `pkgutil.resolve_name`."""


class WarmProcess(contextlib.AbstractContextManager["WarmProcess"]):
    """The runner's side of a warm process, which ends with this context, and of the last forked step."""

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
            )
        self._is_ready: bool | None = None

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], output: int | None
    ) -> bool:
        """Start a command in a fork, as `run_command` would start it. Return whether that was possible."""
        if list(command[:2]) != [sys.executable, "-m"]:
            return False
        if self._is_ready is None:
            self._is_ready = _receive(self._channel) is not None
        if not self._is_ready:
            return False
        streams = (1, 2) if output is None else (output, output)
        inherited = (*streams, *descriptors)
        try:
            self._channel.send((command[2:], dict(environment), len(inherited)))
            for descriptor in inherited:
                send_handle(self._channel, descriptor, None)
        except OSError:
            # The warm process has ended since the last step.
            self._is_ready = False
            return False
        pid = _receive(self._channel)
        if pid is None:
            raise RunStopped("The process that steps are forked from has died; run the command again.")
        self.pid = pid
        self._handle = recv_handle(self._channel)
        return True

    def send_signal(self, number: int) -> None:
        """Send the step a signal."""
        signal.pidfd_send_signal(self._handle, number)

    def wait(self) -> tuple[int, int]:
        """Wait until the step has ended. Return its code and peak memory, as `wait_measured` does."""
        # If the warm process dies, the kernel sends its step SIGTERM. The step's exit code is then unknown.
        code, peak = _receive(self._channel) or (-signal.SIGTERM, 0)
        select.select([self._handle], [], [])
        os.close(self._handle)
        return code, peak


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    output: int | None = None,
    warm: WarmProcess | None = None,
) -> tuple[int, signal.Signals | None, int]:
    """Run a command until it ends.

    The first SIGINT, SIGTERM or SIGHUP is forwarded to the child, which may then finish. The second one kills the child
    and all its descendants, unless it is a SIGHUP, which a closing terminal may send twice.

    Args:
        command: The words of the command.
        environment: Its environment, to which `DEFAULTS` are added.
        descriptors: File descriptors that the child inherits, to hold the lock on the run directory as well.
        output: File descriptor for the child's stdout and stderr; by default, the runner's own.
        warm: Process from which the command is forked if possible; by default, it is a new process.

    Returns:
        The child's return code and peak memory in bytes, as in `wait_measured`, and between them the first signal that
        the runner received, or that the child's code stands for: a cluster may signal only what it has launched.
    """
    # The handler below stays in place until the child has ended, however many signals arrive.
    received: list[signal.Signals] = []
    process: subprocess.Popen[bytes] | WarmProcess | None = None

    def forward_signal(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        leave_closed_terminal()
        is_repeated = len(received) > 1
        if process is None or (is_repeated and received[-1].name == "SIGHUP"):
            return
        if is_repeated:
            # The user does not want to wait for the save.
            _kill_with_descendants(process.pid)
        else:
            process.send_signal(number)

    environment = {**DEFAULTS, **safe_path(), **environment}
    earlier_handlers = {number: signal.signal(number, forward_signal) for number in stop_signals()}
    try:
        if warm is not None and warm.fork(command, environment, descriptors, output):
            process = warm
        else:
            process = _start(command, environment, descriptors, output)
        # A signal came between installing the handlers and starting the child.
        if received:
            process.send_signal(received[0])
        if isinstance(process, WarmProcess):
            code, peak = process.wait()
        else:
            code, peak = _wait(process)
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)
    if received:
        return code, received[0], peak
    stopped = next((number for number in earlier_handlers if code == 128 + number), None)
    return code, stopped, peak


def _start(
    command: Sequence[str], environment: Mapping[str, str], descriptors: Sequence[int], output: int | None
) -> subprocess.Popen[bytes]:
    """Start a command as a new process, with arguments as in `run_command`."""
    preexec = None
    if sys.platform == "linux":
        # Make the step save when the runner dies.
        preexec = signal_with_parent(signal.SIGTERM)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # Otherwise, Ctrl-C in a terminal would reach it twice.
        process_group=0,
        pass_fds=descriptors,
        preexec_fn=preexec,
    )


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Wait for a process that `_start` has started. Return its code and peak memory, as `wait_measured` does."""
    try:
        code, peak = wait_measured(process.pid)
    except ChildProcessError:
        # `Popen.send_signal` has collected the code if a signal came just as the process ended.
        return process.wait(), 0
    process.returncode = code
    return code, peak


def _kill_with_descendants(pid: int) -> None:
    """Kill a process and all that it started: a launcher's workers have their own sessions."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def wait_measured(pid: int) -> tuple[int, int]:
    """Wait until a child has ended. Return its code as `subprocess` defines it, and its peak memory in bytes."""
    _, status, usage = os.wait4(pid, 0)
    # This is the peak of the largest process among the child and its descendants, in KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit


def _receive(channel: Connection) -> Any:
    """Return the next message from the other side, or None if it has ended."""
    with contextlib.suppress(EOFError, OSError):
        return channel.recv()
    return None


def main(argv: Sequence[str]) -> int:
    """Import `argv[1:]`, then fork for each request on the channel `argv[0]`; the fork runs the module of the step."""
    # If the runner has died before this, its channel has ended.
    signal_with_parent(signal.SIGKILL)()
    # The runner may have been started with these signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _import_libraries(argv[1:])
    # Kernels before 5.3 have no process handles. The error ends this process.
    os.close(os.pidfd_open(os.getpid()))
    # Freezing keeps garbage collection in forks from touching, and thereby copying, the imported objects.
    gc.collect()
    gc.freeze()

    channel = Connection(int(argv[0]))
    parent = os.getpid()
    signal_step = signal_with_parent(signal.SIGTERM)
    channel.send("ready")
    while request := _receive(channel):
        (module, *arguments), environment, number = request
        descriptors = [recv_handle(channel) for _ in range(number)]
        pid = os.fork()
        if pid == 0:
            channel.close()
            os.setpgid(0, 0)
            signal_step()
            # If the warm process died before the kernel was asked to signal its death, no signal comes.
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
            _become(module, arguments, environment, descriptors)
        # Otherwise, the locks among them would outlive the step.
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(pid)
        handle = os.pidfd_open(pid)
        send_handle(channel, handle, None)
        os.close(handle)
        channel.send(wait_measured(pid))
    return 0


def _import_libraries(names: Sequence[str]) -> None:
    """Import modules, and prepare for forks; end this process if it cannot be forked safely."""
    gc.disable()
    for name in names:
        resolve_name(name)
    # Compile a table of patterns once. Otherwise, the first model loaded in each fork would, in a third of a second.
    conversions = sys.modules.get("transformers.conversion_mapping")
    if conversions is not None:
        conversions.get_checkpoint_conversion_mapping("llama")
    has_accelerator = "torch" in sys.modules and sys.modules["torch"].accelerator.is_available()
    if threading.active_count() > 1 or has_accelerator:
        # Exit at once, without waiting for threads.
        os._exit(1)
    # Keep forks from freeing torch's operators and tabulating compilations at exit, which takes longer than some steps.
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        atexit.unregister(dynamo.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _become(module: str, arguments: list[str], environment: Mapping[str, str], descriptors: list[int]) -> NoReturn:
    """Run a module in this fork, and exit as Python does, except that objects are left to the kernel.

    Freeing each writes to its page, which has to be copied for the fork first: as much work as a short step.
    """
    for source, target in zip(descriptors, (1, 2), strict=False):
        os.dup2(source, target)
        os.close(source)
    # The warm process has the null device as stdout. Python remembers that one can seek in it, which a step's pipe or
    # terminal refuses, for instance when it sets how errors are encoded.
    raw = FileIO(1, "w", closefd=False)
    sys.stdout = TextIOWrapper(raw, sys.stdout.encoding, sys.stdout.errors, write_through=True)
    os.environ.clear()
    os.environ.update(environment)
    gc.enable()
    code = 0
    try:
        if module == launcher.__name__:
            code = launcher.main(arguments, forked=True)
        else:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        code = stop.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # Flush files that were not closed. Those opened before the fork, such as stdout, are frozen, and not listed here.
    # `isinstance` would look into proxies.
    for opened in (sys.stdout, sys.stderr, *gc.get_objects()):
        if issubclass(type(opened), BufferedRandom | BufferedWriter | TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                opened.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
