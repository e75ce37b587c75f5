"""Symbolic equality by math-verify, with a time limit that cannot be evaded.

SymPy evaluates what it parses (`9^{9^{9^9}}`), for hours and in C code that a Python handler cannot interrupt. So it
runs in a child process that is confined (`pipeline.rewards.sandbox.confinement`), limited in memory, and killed when it
takes too much CPU time, so that the verdict does not depend on the load of the machine. math-verify's own limit,
`signal.alarm`, works only in the main thread, and not against one long multiplication. The child starts with the first
answer that needs it and serves until this process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

from pipeline.errors import RunStopped

MAX_LENGTH = 300
"""Characters in an expression; longer ones are not parsed."""
SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""Wall-clock time for an answer; a machine that needs longer for `SECONDS` of CPU time is too busy for a verdict."""
MAX_SLOW = 5
START_SECONDS = 60.0
MEMORY_MB = 2048


class Timeout(Exception):
    """The child ended, because the expression took too long."""


class Busy(Timeout):
    """The child had to be killed before it had its CPU time."""


class Checker:
    """The child process, which starts when it is first asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.Queue[str] = queue.Queue()
        self.lock = threading.Lock()

    def ask(self, reference: str, answer: str | None) -> bool:
        """Compare an answer with its reference or, without an answer, return whether the reference parses.

        Raises:
            Timeout: If it took too long, or the child died.
            Busy: If the machine is too busy.
        """
        with self.lock:
            if self.process is None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps([reference, answer]) + "\n")
                self.process.stdin.flush()
                return self._reply(PATIENCE_SECONDS) == "true"
            except Timeout:
                self.stop()
                raise
            except OSError as error:
                self.stop()
                raise Timeout from error

    def stop(self) -> None:
        """Kill the child; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    assert stream is not None
                    stream.close()
            self.process = None

    def _start(self) -> None:
        # Windows cannot start a process without SYSTEMROOT.
        kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.rewards.math_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": "0", **kept},
            text=True,
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        self.replies = queue.Queue()
        # A thread reads, because Windows cannot wait for a pipe with a time limit.
        threading.Thread(target=_forward_lines, args=(self.process.stdout, self.replies), daemon=True).start()
        try:
            self._reply(START_SECONDS)
        except Timeout:
            self.stop()
            remedy = "see what `python -m pipeline.rewards.math_check` prints"
            raise RunStopped(f"The process of math-verify, which math_answer needs, did not start; {remedy}.") from None

    def _reply(self, seconds: float) -> str:
        try:
            line = self.replies.get(timeout=seconds)
        except queue.Empty:
            raise Busy from None
        if not line:
            raise Timeout
        return line.strip()


def _forward_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put the lines of a stream into a queue, and "" at its end."""
    with contextlib.suppress(OSError, ValueError):  # it is closed meanwhile
        for line in stream:
            lines.put(line)
    lines.put("")


_checker = Checker()


def compare(pairs: Sequence[tuple[str, str | None]]) -> list[bool | None]:
    """Check with math-verify that each answer equals its reference. Without answers, check that the references parse.

    Expressions of more than 300 characters and those that take longer than 2 s give False. After five slow ones, the
    rest of the call gives False unseen, so that a policy that writes such answers cannot stall its training. Where the
    machine is too busy, the result is None.
    """
    known: dict[tuple[str, str | None], bool | None] = {}
    slow, busy = 0, False
    for pair in dict.fromkeys(pairs):
        try:
            known[pair] = None if busy else slow < MAX_SLOW and _ask(*pair)
        except Busy:
            busy, known[pair] = True, None
        except Timeout:
            slow += 1
            known[pair] = False
    return [known[pair] for pair in pairs]


@lru_cache(maxsize=65_536)
def _ask(reference: str, answer: str | None) -> bool:
    return len(reference) <= MAX_LENGTH and len(answer or "") <= MAX_LENGTH and _checker.ask(reference, answer)


def _serve() -> None:
    """Read lines of [reference, answer or null], and write true or false: the main function of the child."""
    import logging
    import signal

    from math_verify import LatexExtractionConfig, parse, verify

    from pipeline.rewards.sandbox import confinement

    logging.disable(logging.CRITICAL)

    def read(expression: str) -> list[object]:
        latex = [LatexExtractionConfig()]
        return list(parse(f"${expression}$", extraction_config=latex, fallback_mode="no_fallback", parsing_timeout=0))

    def limit_time(seconds: float) -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_PROF, seconds)

    verify(read(r"\frac{1}{2}"), read("0.5"), timeout_seconds=0)  # triggers the deferred imports
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.chdir(directory)
        confinement.limit_resources(10**6, MEMORY_MB)
        files_confined = confinement.confine_files(directory)
        confinement.drop_privileges(files_confined)
        confinement.confine_calls(files_confined)
        print("ready", flush=True)
        for line in sys.stdin:
            reference, answer = json.loads(line)
            limit_time(SECONDS)  # of CPU time, after which the kernel ends this process
            parsed = read(reference)
            result = bool(parsed) and (answer is None or verify(parsed, read(answer), timeout_seconds=0))
            limit_time(0)
            print(json.dumps(bool(result)), flush=True)


if __name__ == "__main__":
    _serve()
