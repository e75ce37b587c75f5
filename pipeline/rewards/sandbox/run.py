"""Run code that a model wrote against a test, without trusting it.

Every run is a fresh Python process with nothing but the standard library, an empty environment and an empty temporary
directory. `confinement.py` lists what the process may not do, and `child.py` explains why wrong code cannot pass its
test. String hashes are not randomised, so that verdicts are repeatable.
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
CODE_SECONDS, CODE_MEMORY_MB = 2.0, 256
"""Default limits of CPU time and, in MiB, of address space, of which Python takes about 40; `confinement` sets them."""
OUTPUT_BYTES = 16_384
PATIENCE_SECONDS = 30.0
"""Wall-clock limit for a loaded machine to start Python, and again to run the code."""

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
    """The result of one run, and the first 16 KiB of what the code and the test printed, including errors.

    `status` is "passed", "failed" (an exception), "timeout", "memory", "refused" (an attempt to use the network, a
    process or a file outside; too many files), "crashed" (no verdict) or "busy" (time ran out because of the machine).
    """

    status: str
    output: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


_probe = cache(lambda: _run(RIGHT, PROBE, PATIENCE_SECONDS, 256, unconfined=True))


def validate_sandbox() -> str | None:
    """Test the sandbox. Return in one line why code cannot be graded on this machine, or None."""
    outcome = _probe()
    lines = outcome.output.strip().splitlines()
    if outcome.status == "busy":
        return f"the machine is too busy to run code ({outcome.output or 'it took too long'}); start again later"
    if not outcome.passed:
        reason = lines[-1] if lines else outcome.status
        return f"right code fails here ({reason}); every user must be able to read {sys.base_prefix}"
    if lines and not allow_unconfined:
        return f"code could {' and '.join(lines)}; use Linux 5.13 or later, or accept it with allow_unconfined_code"
    return None


def run_code(code: str, test: str, *, seconds: float = CODE_SECONDS, memory_mb: int = CODE_MEMORY_MB) -> Outcome:
    """Run `code`, then `test`: assertions about what it defines. Whatever the code does, this function returns.

    `seconds` run from the start of the code, not counting waits for a core. Raise `RunStopped` if it cannot be graded.
    """
    if fault := validate_sandbox():
        raise RunStopped(f"code_tests: {fault}")
    outcome = _run(code, test, seconds, memory_mb, unconfined=allow_unconfined)
    if outcome.status == "unconfined":
        raise RunStopped("code_tests: the kernel does not confine code here")
    return outcome


def run_many(
    pairs: Sequence[tuple[str, str]], *, seconds: float = CODE_SECONDS, memory_mb: int = CODE_MEMORY_MB
) -> list[Outcome]:
    """Call `run_code` on pairs of code and test, on all cores of this rank."""
    if not pairs:
        return []
    # Validate once here, instead of in every thread.
    validate_sandbox()
    workers = hardware.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max(1, min(workers, len(pairs)))) as pool:
        return list(pool.map(lambda pair: run_code(*pair, seconds=seconds, memory_mb=memory_mb), pairs))


def _run(code: str, test: str, seconds: float, memory_mb: int, unconfined: bool) -> Outcome:
    token = secrets.token_hex(16)
    # -I means -E -P -s, and -E would ignore the variable that makes verdicts repeatable.
    flags = ["-s", "-P", "-S", "-u", "-X", "utf8"]
    try:
        reader, writer = os.pipe()
        with (
            open(reader, "rb", buffering=0),
            open(writer, "wb", buffering=0) as verdict,
            tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as directory,
            tempfile.TemporaryFile() as work,
            tempfile.NamedTemporaryFile() as output,
            # The code must neither read nor overwrite what its test prints.
            open(output.name, "ab") as printed,
        ):
            work.write(json.dumps({"code": code, "test": test, "token": token}).encode())
            work.seek(0)
            process = subprocess.Popen(
                [sys.executable, *flags, str(CHILD), *map(str, (writer, seconds, memory_mb, int(unconfined)))],
                stdin=work,
                stdout=printed,
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
                # Kill the child's session, which seccomp keeps the candidate in, too.
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
    """Wait for the child's two lines or its end, and watch its directory; its time begins with the first line."""
    verdict = b""
    candidate: int | None = None
    ready = select.poll()
    ready.register(reader)
    began, before = time.monotonic(), (0.0, 0.0)
    while (elapsed := time.monotonic() - began) < PATIENCE_SECONDS + seconds:
        # The code may be deleting files, or have locked its directory.
        sizes: list[int] = []
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
        if len(sizes) > 64 or sum(sizes) > 8 << 20:
            return "refused"
        if candidate:
            ran, waited = (now - then for now, then in zip(_times(examiner, candidate, elapsed), before, strict=True))
            # While they exchange messages, one runs while the other one waits.
            if max(ran, elapsed - waited) > seconds:
                return "timeout"
        if not ready.poll(50):
            continue
        data = os.read(reader, 1 << 16)
        verdict += data
        lines = [line.partition(b" ") for line in verdict.split(b"\n")[:-1]]
        if any(line[0] != token for line in lines) or (len(lines) < 2 and not data):
            return "crashed"
        if len(lines) > 1:
            return lines[1][2].decode()
        if lines and candidate is None:
            candidate = int(lines[0][2])
            began, before = time.monotonic(), _times(examiner, candidate, 0.0)
    return "busy"


def _times(examiner: int, candidate: int, elapsed: float) -> tuple[float, float]:
    """Return how long both processes ran, and waited for a core; an estimate on systems other than Linux."""
    # The file does not exist except on Linux, nor for processes that have just ended.
    with contextlib.suppress(OSError, ValueError):
        found = [Path(f"/proc/{pid}/schedstat").read_text().split() for pid in (examiner, candidate)]
        if all(int(slices) for _, _, slices in found):
            ran, waited = (sum(int(one[column]) / 1e9 for one in found) for column in (0, 1))
            return ran, waited
    return 0.0, elapsed * (1 - 1 / max(1.0, os.getloadavg()[0] / hardware.cores()))
