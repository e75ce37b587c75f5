"""Runs code that a model wrote against a test, without trusting it.

Every run is a fresh Python process with nothing but the standard library, an empty environment and an empty
temporary directory that is deleted afterwards; `pipeline.rewards.sandbox.confinement` lists what it may not do,
`pipeline.rewards.sandbox.child` says why code cannot pass a test that it should fail. Verdicts repeat: string
hashes are not randomised.
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

Status = Literal["passed", "failed", "timeout", "memory", "refused", "crashed"]

CODE_CHARACTERS = 200_000
OUTPUT_BYTES = 16_384
DIRECTORY_BYTES = 8 << 20
DIRECTORY_FILES = 64
START_SECONDS = 30.0  # for a loaded machine to start Python; the code has not run yet
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        passed: the code ran, and so did the whole test, with no exception.
        status: "passed"; "failed" (an assertion, an exception, `sys.exit`); "timeout" (wall clock or CPU);
            "memory"; "refused" (an attempt at the network, a process, a file outside; too many files);
            "crashed" (the process is gone).
        seconds: wall clock, start of the process included.
        output: what code and test printed, errors included, cut at 16 KiB.
    """

    passed: bool
    status: Status
    seconds: float
    output: str


def run_code(code: str, test: str, *, seconds: float = 2.0, memory_mb: int = 256) -> Outcome:
    """Runs `code`, then `test` (assertions on what the code defines); whatever the code does, this returns.

    Args:
        code: Python source. At most 200,000 characters.
        test: Python source that raises if the code is wrong. An empty test passes if the code runs.
        seconds: wall-clock limit from the moment the code starts; a CPU limit a second above it.
        memory_mb: address space in MiB; Python itself takes about 40.
    """
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
    """`run_code` on many (code, test) pairs, in their order, `workers` at a time (default: one a core)."""
    with ThreadPoolExecutor(max(1, min(workers or os.cpu_count() or 1, len(pairs)))) as pool:
        return list(pool.map(lambda pair: run_code(*pair, seconds=seconds, memory_mb=memory_mb), pairs))


def _run(work: bytes, directory: str, seconds: float, memory_mb: int) -> tuple[Status, bytes]:
    reader, writer = os.pipe()
    child = Path(__file__).with_name("child.py")
    # -I would be -E -P -s, and -E would forbid the one variable that makes verdicts repeat
    command = [
        sys.executable,
        "-s",
        "-P",
        "-S",
        "-B",
        "-u",
        "-X",
        "utf8",
        str(child),
        str(writer),
        str(seconds),
        str(memory_mb),
    ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writer,),
        cwd=directory,
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    os.close(writer)
    candidate: int | None = None
    try:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(work)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read: no verdict, "crashed"
        status, candidate, output = _wait(process.stdout.fileno(), reader, directory, seconds)
    finally:
        _kill(process.pid, candidate)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        os.close(reader)
    return status, output


def _wait(output_fd: int, verdict_fd: int, directory: str, seconds: float) -> tuple[Status, int | None, bytes]:
    """Follows the child until its verdict, its end or its time; drains its output, looks at its directory."""
    output, verdict, candidate = b"", b"", None
    deadline = time.monotonic() + START_SECONDS
    looked = 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(output_fd, selectors.EVENT_READ)
        selector.register(verdict_fd, selectors.EVENT_READ)
        while (now := time.monotonic()) < deadline:
            if now - looked > LOOK_SECONDS:
                looked = now
                if _too_much(directory):
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
                    return (
                        lines[1]["status"] if len(lines) > 1 else "crashed",
                        candidate,
                        output + _rest(output_fd, output),
                    )
    return "timeout", candidate, output


def _rest(output_fd: int, output: bytes) -> bytes:
    """What is in the pipe already; the candidate may hold it open for ever."""
    os.set_blocking(output_fd, False)
    try:
        return os.read(output_fd, OUTPUT_BYTES)[: OUTPUT_BYTES - len(output)]
    except BlockingIOError:
        return b""


def _too_much(directory: str) -> bool:
    try:
        with os.scandir(directory) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
    except FileNotFoundError:  # it is deleting while we look
        return False
    return len(sizes) > DIRECTORY_FILES or sum(sizes) > DIRECTORY_BYTES


def _kill(group: int, candidate: int | None) -> None:
    """The child's whole session, and its candidate by id where no seccomp keeps it in the session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if candidate is not None and sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError):
            os.kill(candidate, signal.SIGKILL)
