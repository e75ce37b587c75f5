"""Symbolic equality by math-verify, with a time limit that holds.

SymPy evaluates what it parses (`9^{9^{9^9}}`), for hours and in C code that no Python handler interrupts, so it runs
in a child process: confined (`pipeline.rewards.sandbox.confinement`), limited in memory, killed when it takes too long.
math-verify's own limit is `signal.alarm`: main thread only, and powerless against one long multiplication. The child
starts at the first answer that needs it and serves until this process ends, JSON lines in and out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

LONGEST = 300
"""Characters of an expression beyond which it is not parsed."""
SECONDS = 2.0
MOST_SLOW = 5
START_SECONDS = 60.0
MEMORY_MB = 2048


class Timeout(Exception):
    """The child had to be killed."""


class Checker:
    """The child process, started when first asked."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def ask(self, reference: str, answer: str | None, seconds: float) -> bool:
        """One comparison, or (no answer) whether `reference` parses.

        Raises:
            Timeout: it took longer than `seconds`, or the child died of it.
        """
        with self.lock:
            if self.process is None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps([reference, answer]).encode() + b"\n")
                self.process.stdin.flush()
                reply = self._line(seconds)
            except (BrokenPipeError, Timeout) as error:
                self.stop()
                raise Timeout from error
            return reply == "true"

    def stop(self) -> None:
        """Ends the child; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert stream is not None
                    stream.close()
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.rewards.math_check"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": "0"},
        )
        if self._line(START_SECONDS) != "ready":
            raise RuntimeError("the math-verify process did not start; try `python -m pipeline.rewards.math_check`")

    def _line(self, seconds: float) -> str:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise Timeout
        line = self.process.stdout.readline()
        if not line:
            raise Timeout
        return line.decode().strip()


_checker = Checker()


def parses(reference: str) -> bool:
    """Whether math-verify finds an expression in `reference`; False for what is too long or takes too
    long."""
    return compare([(reference, None)])[0]


def compare(pairs: Sequence[tuple[str, str | None]]) -> list[bool]:
    """Whether math-verify holds each answer equal to its reference (no answer: whether the reference parses).

    False for what is longer than 300 characters or takes longer than 2 s. After five that take too long, the
    rest of the call is False unseen: a policy that writes such answers must not stop its training.
    """
    known: dict[tuple[str, str | None], bool] = {}
    slow = 0
    for pair in dict.fromkeys(pairs):
        try:
            known[pair] = slow < MOST_SLOW and _ask(*pair)
        except Timeout:
            slow += 1
            known[pair] = False
    return [known[pair] for pair in pairs]


@lru_cache(maxsize=65_536)
def _ask(reference: str, answer: str | None) -> bool:
    return len(reference) <= LONGEST and len(answer or "") <= LONGEST and _checker.ask(reference, answer, SECONDS)


def _serve() -> None:
    """The child: reads [reference, answer or null] lines, writes true or false."""
    import logging
    import signal

    from math_verify import LatexExtractionConfig, parse, verify

    from pipeline.rewards.sandbox import confinement

    logging.disable(logging.CRITICAL)

    def read(expression: str) -> list[object]:
        found = parse(
            f"${expression}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=0,
        )
        return list(found)

    verify(read(r"\frac{1}{2}"), read("0.5"), timeout_seconds=0)  # loads what it loads late
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        confinement.limit_resources(10**6, MEMORY_MB)
        files_confined = confinement.confine_files(directory)
        confinement.drop_privileges(files_confined)
        confinement.confine_calls(files_confined)
        print("ready", flush=True)
        for line in sys.stdin:
            reference, answer = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)  # kills, should the parent no longer be there to do it
            parsed = read(reference)
            result = bool(parsed) and (answer is None or verify(parsed, read(answer), timeout_seconds=0))
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(bool(result)), flush=True)


if __name__ == "__main__":
    _serve()
