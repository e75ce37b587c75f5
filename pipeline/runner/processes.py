"""Running a step as a child process: signals reach it, it may save, and it does not outlive the runner."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from pipeline.errors import Problem, UserError

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
ORPHAN_SECONDS = 60


def child_environment(num_processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a step; what the user has set stays.

    Args:
        num_processes: among which the processor's cores are divided.
        environment: that of the runner.

    Returns:
        `environment` with telemetry off, output unbuffered and the number of threads.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's and the Hub client's
        "DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn when a process that used threads forks
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),  # `accelerate launch` would set 1
    }
    return {**defaults, **environment}


def run(command: Sequence[str], environment: Mapping[str, str], lock: int) -> tuple[int, signal.Signals | None]:
    """Run `command` to its end.

    A first SIGINT or SIGTERM is handed on, once, and the child is waited for; a second one kills it with all
    that it has started. The child has its own process group, or a terminal's Ctrl-C would reach it twice.

    Args:
        command: program and arguments.
        environment: of the child.
        lock: file descriptor that the child inherits: while it lives, the run directory stays locked.

    Returns:
        The child's return code as of `subprocess`, and the signal that the runner got, if any.
    """
    received: list[signal.Signals] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        if process is None:
            return
        if len(received) == 1:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
        else:
            _kill_tree(process.pid)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            process_group=0,
            pass_fds=(lock,),
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        if received:  # between the handlers' installation and the start
            process.send_signal(received[0])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, received[0] if received else None


if sys.platform == "linux":
    _prctl = ctypes.CDLL(None).prctl

    def _end_with_parent() -> None:
        """In the child: get SIGTERM, and so save, when the runner dies without having been able to tell."""
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_tree(pid: int) -> None:
    """Kill the process and all that descend from it: the workers of a launcher have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Hold the lock of a run directory, which is made if it does not exist.

    A step whose runner was killed holds the lock until it has saved; it is waited for.

    Yields:
        The file descriptor that holds the lock, for children to inherit.

    Raises:
        UserError: another run is writing there, or the directory cannot be written.
    """
    path = run_dir / "run.lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}); choose another --output_dir"
        raise UserError(Problem("output_dir", run_dir, remedy)) from error
    try:
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not _try_lock(descriptor):
            holder = _read_pid(descriptor)
            if (holder is None or _is_alive(holder)) or time.monotonic() > deadline:
                remedy = f"process {holder} is writing there; wait for it, or choose another --output_dir"
                raise UserError(Problem("output_dir", run_dir, remedy))
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode()
    return int(text) if text.isdigit() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
