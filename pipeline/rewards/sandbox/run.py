"""Run code that a model wrote against a test, without trusting it.

Every run is a fresh Python process with nothing but the standard library, an empty environment and an empty temporary
directory. `confinement.py` lists what the process may not do, and `child.py` explains why wrong code cannot pass its
test. String hashes are not randomised, so that verdicts are repeatable. The sandbox needs `os.fork`, which Windows
lacks. Code that the kernel cannot confine only runs if `allow_unconfined` is set. `validate_sandbox` says what is
missing on this machine.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline import hardware
from pipeline.errors import RunStopped

allow_unconfined = False
"""Whether code may also run where the kernel does not confine it: the user's `allow_unconfined_code`."""
CHILD = Path(__file__).with_name("child.py")
CODE_SECONDS = 2.0
"""Default limit of CPU time, which `confinement` sets."""
CODE_MEMORY_MB = 256
"""Default limit of address space in MiB, of which Python takes about 40."""
OUTPUT_BYTES = 16_384
"""Bytes of output that are read. The process may write more, up to the limit of a file in `confinement`."""
PATIENCE_SECONDS = 30.0
"""Wall-clock limit for a loaded machine to start Python, and again to run the code."""

# `validate_sandbox` runs right code with a test that prints which of the sandbox's promises this machine breaks.
RIGHT = "import collections, itertools, json, math, random, re\ndef f(xs):\n    return sorted(xs)"
PROBE = """
import os, socket
assert f([2, 1]) == [1, 2]
for promise, attempt in {
    "read files (Landlock is missing)": lambda: os.listdir("/"),
    "use the network (seccomp is missing)": socket.socket,
    "signal processes": lambda: os.kill(os.getppid(), 0),
}.items():
    try:
        attempt()
        print(promise)
    except OSError:
        pass
"""


class Outcome(NamedTuple):
    """The result of one run.

    Attributes:
        status: One of

            - "passed": the code and the whole test ran without an exception
            - "failed": an assertion, an exception, `sys.exit`
            - "timeout", "memory": a limit was exceeded
            - "refused": an attempt to use the network, a process or a file outside; too many files
            - "crashed": the process ended without a verdict
            - "busy": the machine was too busy to start the code, or to give it its time
        output: What the code and the test printed, including errors, cut off at 16 KiB.
    """

    status: str
    output: str

    @property
    def passed(self) -> bool:
        """Whether the code passed its test."""
        return self.status == "passed"


@cache
def _probe() -> Outcome:
    """Run right code in the sandbox with a test that tries what it must not do. The output names what it could do."""
    return _run(RIGHT, PROBE, PATIENCE_SECONDS, 256, unconfined=True)


def validate_sandbox() -> str | None:
    """Test the sandbox. Return in one line why code cannot be graded on this machine, or None."""
    outcome = _probe()
    # Each line names something that the probe could do, such as "read files (Landlock is missing)", or is an error.
    lines = outcome.output.strip().splitlines()
    if outcome.status == "busy":
        return f"the machine is too busy to run code ({outcome.output or 'it took too long'}); start again later"
    if not outcome.passed:
        reason = lines[-1] if lines else outcome.status
        # Without capabilities, even root cannot import modules from a folder that is closed to others.
        return f"right code fails here ({reason}); every user must be able to read {sys.base_prefix}"
    if lines and not allow_unconfined:
        return f"code could {' and '.join(lines)}; use Linux 5.13 or later, or accept it with allow_unconfined_code"
    return None


def run_code(code: str, test: str, *, seconds: float = CODE_SECONDS, memory_mb: int = CODE_MEMORY_MB) -> Outcome:
    """Run `code`, then `test`. Whatever the code does, this function returns.

    Args:
        code: Python source.
        test: Python source that raises if the code is wrong: assertions about what the code defines. An empty test
            passes if the code runs.
        seconds: Time limit from the start of the code, not counting waits for a core.
        memory_mb: Limit of the address space in MiB.

    Raises:
        RunStopped: If code cannot be graded here; see `validate_sandbox`.
    """
    fault = validate_sandbox()
    if fault:
        raise RunStopped(f"code_tests: {fault}")
    outcome = _run(code, test, seconds, memory_mb, unconfined=allow_unconfined)
    if outcome.status == "unconfined":
        raise RunStopped("code_tests: the kernel does not confine code here")
    return outcome


def run_many(
    pairs: Sequence[tuple[str, str]], *, seconds: float = CODE_SECONDS, memory_mb: int = CODE_MEMORY_MB
) -> list[Outcome]:
    """Call `run_code` on pairs of code and test, on all cores of this rank. Return an outcome for each, in order."""
    if not pairs:
        return []
    # Validate once here, instead of in every thread.
    validate_sandbox()
    workers = hardware.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(workers, len(pairs)))) as pool:
        return list(pool.map(lambda pair: run_code(*pair, seconds=seconds, memory_mb=memory_mb), pairs))


def _run(code: str, test: str, seconds: float, memory_mb: int, unconfined: bool) -> Outcome:
    """Start the child on code and test, wait for its verdict, and kill it and its session.

    The arguments are the ones of `run_code`. `unconfined` says whether the child may run where the kernel does not
    confine it; if not, the status there is "unconfined", in addition to the statuses in `Outcome`.
    """
    # The verdict comes through a pipe, and is only believed with this token.
    token = secrets.token_hex(16)
    # -I means -E -P -s, and -E would ignore the variable that makes verdicts repeatable.
    flags = ["-s", "-P", "-S", "-u", "-X", "utf8"]
    try:
        reader, writer = os.pipe()
        with (
            open(reader, "rb", buffering=0),
            open(writer, "wb", buffering=0) as verdict,
            tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory,
            tempfile.TemporaryFile() as task,
            tempfile.NamedTemporaryFile() as output,
            # The code must neither read nor overwrite what its test prints.
            open(output.name, "ab") as append_output,
        ):
            task.write(json.dumps({"code": code, "test": test, "token": token}).encode())
            task.seek(0)
            process = subprocess.Popen(
                [sys.executable, *flags, str(CHILD), *map(str, (writer, seconds, memory_mb, int(unconfined)))],
                stdin=task,
                stdout=append_output,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                cwd=directory,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
            verdict.close()
            try:
                status = _wait(process.pid, reader, token.encode(), directory, seconds)
            finally:
                # Kill the whole session. The candidate is in it as well: seccomp does not let it start another one.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            text = output.read(OUTPUT_BYTES).decode(errors="replace")
            # The folder's name is random, and a model that reads it would answer differently in each run.
            return Outcome(status, text.replace(directory, "/sandbox"))
    # The machine ran out of descriptors, processes, memory or disk space.
    except OSError as error:
        return Outcome("busy", str(error))


def _wait(examiner: int, reader: int, token: bytes, directory: str, seconds: float) -> str:
    """Wait for the child's verdict, its end, or the end of its time, and return a status as in `Outcome`.

    The child writes two lines, "TOKEN CANDIDATE" and "TOKEN STATUS". Its time begins with the first one.

    Args:
        examiner: Id of the child's process; the id of its candidate is in the first line.
        reader: Descriptor from which the child's lines are read.
        token: What each line begins with.
        directory: The working directory of the child. It is watched, so that the code does not fill the disk.
        seconds: Limit of the time that both processes run.
    """
    verdict = b""
    candidate: int | None = None
    ready = select.poll()
    ready.register(reader)
    start = time.monotonic()
    start_times = (0.0, 0.0)
    while (elapsed := time.monotonic() - start) < PATIENCE_SECONDS + seconds:
        if _exceeds_disk_limits(directory):
            return "refused"
        if candidate:
            times = _seconds_of_both(examiner, candidate, elapsed)
            ran = times[0] - start_times[0]
            waited = times[1] - start_times[1]
            # Of two processes that exchange messages, one runs while the other one waits for it. So they are limited by
            # the sum of their times, and by the wall-clock time without waits for a core, which also counts sleeping.
            if max(ran, elapsed - waited) > seconds:
                return "timeout"
        if not ready.poll(50):
            continue
        data = os.read(reader, 1 << 16)
        verdict += data
        lines = [line.partition(b" ") for line in verdict.split(b"\n")[:-1]]
        if any(prefix != token for prefix, _, _ in lines):
            return "crashed"
        # Nothing to read although it is ready: the child has ended.
        if len(lines) < 2 and not data:
            return "crashed"
        if len(lines) > 1:
            return lines[1][2].decode()
        if lines and candidate is None:
            candidate = int(lines[0][2])
            start = time.monotonic()
            start_times = _seconds_of_both(examiner, candidate, 0.0)
    return "busy"


def _exceeds_disk_limits(directory: str) -> bool:
    """Return whether a directory has more than 64 files, or more than 8 MiB."""
    sizes: list[int] = []
    # The code may be deleting files, or have locked its directory.
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
    return len(sizes) > 64 or sum(sizes) > 8 << 20


def _seconds_of_both(examiner: int, candidate: int, elapsed: float) -> tuple[float, float]:
    """Return how many seconds both processes together have run, and have waited for a core, since they started.

    On systems other than Linux, the first number is 0, and the second one is estimated from the load.

    Args:
        examiner: Id of a process.
        candidate: Id of the other process.
        elapsed: Seconds since the code began, for the estimate.
    """
    # The file only exists on Linux, and not for processes that have just ended.
    with contextlib.suppress(OSError, ValueError):
        # Nanoseconds of running, nanoseconds of waiting, and the number of time slices, by process.
        files = [Path(f"/proc/{pid}/schedstat") for pid in (examiner, candidate)]
        statistics = [file.read_text("utf-8").split() for file in files]
        if all(int(slices) for _, _, slices in statistics):
            ran = sum(int(running) / 1e9 for running, _, _ in statistics)
            waited = sum(int(waiting) / 1e9 for _, waiting, _ in statistics)
            return ran, waited
    load = max(1.0, os.getloadavg()[0] / hardware.cores())
    return 0.0, elapsed * (1 - 1 / load)
