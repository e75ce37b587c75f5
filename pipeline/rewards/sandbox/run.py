"""Running code that a model wrote against a test, without trusting it.

Every run is a fresh Python process with nothing but the standard library, an empty environment and an empty temporary
directory that is deleted afterwards. `pipeline.rewards.sandbox.confinement` lists what the process may not do, and
`pipeline.rewards.sandbox.child` explains why wrong code cannot pass its test. String hashes are not randomised, so that
verdicts are repeatable. The sandbox needs `os.fork`, which Windows lacks.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import RunStopped

Status = Literal["passed", "failed", "timeout", "memory", "refused", "crashed"]

CODE_CHARACTERS = 200_000
OUTPUT_BYTES = 16_384
DIRECTORY_BYTES = 8 << 20
DIRECTORY_FILES = 64
START_SECONDS = 30.0
"""Time for a loaded machine to start Python, before the code runs."""
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """The result of one run.

    Attributes:
        passed: Whether the code and the whole test ran without an exception.
        status: "passed"; "failed" (an assertion, an exception, `sys.exit`); "timeout" (wall clock or CPU); "memory";
            "refused" (an attempt to use the network, a process or a file outside; too many files); "crashed" (the
            process ended without a verdict).
        seconds: Wall-clock time, including the start of the process.
        output: What the code and the test printed, including errors, cut off at 16 KiB.
    """

    passed: bool
    status: Status
    seconds: float
    output: str


def is_supported() -> bool:
    """Return whether the sandbox can run on this system."""
    return hasattr(os, "fork")


def run_code(code: str, test: str, *, seconds: float = 2.0, memory_mb: int = 256) -> Outcome:
    """Run `code`, then `test`. Whatever the code does, this function returns.

    Args:
        code: Python source of at most 200,000 characters.
        test: Python source that raises if the code is wrong: assertions about what the code defines. An empty test
            passes if the code runs.
        seconds: Wall-clock limit from the moment the code starts; the limit of CPU time is one second above it.
        memory_mb: Limit of the address space in MiB; Python itself takes about 40.

    Raises:
        RunStopped: The sandbox cannot run on this system.
    """
    if not is_supported():
        raise RunStopped("Code can only be graded where Python has os.fork: run this step on Linux or macOS.")
    began = time.monotonic()
    if len(code) > CODE_CHARACTERS:
        return Outcome(False, "refused", 0.0, f"more than {CODE_CHARACTERS} characters of code")
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory:
        status, output = _run(json.dumps({"code": code, "test": test}).encode(), directory, seconds, memory_mb)
    return Outcome(status == "passed", status, time.monotonic() - began, output.decode(errors="replace"))


def run_many(
    pairs: Sequence[tuple[str, str]],
    *,
    seconds: float = 2.0,
    memory_mb: int = 256,
    workers: int | None = None,
) -> list[Outcome]:
    """Call `run_code` on many pairs of code and test, `workers` at a time (default: one per core), and keep the order.

    Raises:
        RunStopped: The sandbox cannot run on this system.
    """
    if not pairs:
        return []
    with ThreadPoolExecutor(max(1, min(workers or os.cpu_count() or 1, len(pairs)))) as pool:
        return list(pool.map(lambda pair: run_code(*pair, seconds=seconds, memory_mb=memory_mb), pairs))


def _run(work: bytes, directory: str, seconds: float, memory_mb: int) -> tuple[Status, bytes]:
    reader, writer = os.pipe()
    child = str(Path(__file__).with_name("child.py"))
    # -I would be -E -P -s, and -E would forbid the one variable that makes verdicts repeatable.
    flags = ["-s", "-P", "-S", "-B", "-u", "-X", "utf8"]
    process = subprocess.Popen(
        [sys.executable, *flags, child, str(writer), str(seconds), str(memory_mb)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writer,),
        cwd=directory,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    os.close(writer)
    assert process.stdin is not None and process.stdout is not None
    candidate: int | None = None
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended before it read: "crashed", for lack of a verdict
            process.stdin.write(work)
            process.stdin.close()
        status, candidate, output = _wait(process.stdout.fileno(), reader, directory, seconds)
    finally:
        _kill(process.pid, candidate)
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        os.close(reader)
    return status, output


def _wait(output_fd: int, verdict_fd: int, directory: str, seconds: float) -> tuple[Status, int | None, bytes]:
    """Wait for the child's verdict, end or timeout; meanwhile drain its output and watch its directory."""
    output, verdict, candidate = b"", b"", None
    deadline = time.monotonic() + START_SECONDS
    looked = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(output_fd, selectors.EVENT_READ)
        selector.register(verdict_fd, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            if now - looked > LOOK_SECONDS:
                looked = now
                if _is_overfull(directory):
                    return "refused", candidate, output
            for key, _ in selector.select(min(LOOK_SECONDS, deadline - now)):
                data = os.read(key.fd, 1 << 16)
                if key.fd == output_fd:
                    output = (output + data)[:OUTPUT_BYTES]
                    if not data:
                        selector.unregister(output_fd)
                    continue
                verdict += data
                lines = [json.loads(line) for line in verdict.split(b"\n")[:-1]]
                if lines and candidate is None:
                    candidate = lines[0]["candidate"]
                    deadline = time.monotonic() + seconds
                if len(lines) > 1 or not data:
                    status: Status = lines[1]["status"] if len(lines) > 1 else "crashed"
                    return status, candidate, output + _rest(output_fd, output)
    return "timeout", candidate, output


def _rest(output_fd: int, output: bytes) -> bytes:
    """Read what is already in the pipe, which the candidate may hold open forever."""
    os.set_blocking(output_fd, False)
    try:
        return os.read(output_fd, OUTPUT_BYTES)[: OUTPUT_BYTES - len(output)]
    except BlockingIOError:
        return b""


def _is_overfull(directory: str) -> bool:
    try:
        with os.scandir(directory) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
    except FileNotFoundError:  # the code is deleting files
        return False
    return len(sizes) > DIRECTORY_FILES or sum(sizes) > DIRECTORY_BYTES


def _kill(group: int, candidate: int | None) -> None:
    """Kill the child's session, and its candidate by id where seccomp does not keep it in the session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if candidate is not None and sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError):
            os.kill(candidate, signal.SIGKILL)
