"""A child process that judges answers, with a time limit that cannot be evaded.

Judges evaluate what a model wrote (`9^{9^{9^9}}`), for hours and in C code that a Python handler cannot interrupt. So
they run in a child process that is confined (`pipeline.rewards.sandbox.confinement`), limited in memory, and killed
when it takes too much CPU time, so that the verdict does not depend on the load of the machine. The child starts with
the first answer that needs it and serves until this process ends.
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
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from pipeline.errors import RunStopped

SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""Wall-clock time for an answer; a machine that needs longer for `SECONDS` of CPU time is too busy for a verdict."""
MAX_SLOW = 5
START_SECONDS = 60.0
MEMORY_MB = 2048

Question = TypeVar("Question", bound=Hashable)
Verdict = TypeVar("Verdict")


class Timeout(Exception):
    """The child ended, because the answer took too long."""


class Busy(Timeout):
    """The child had to be killed before it had its CPU time."""


class Checker:
    """The child process, which starts when it is first asked.

    Args:
        module: What the child runs, with `python -m`; it calls `serve`.
        purpose: What it does and who needs it, for messages.
    """

    def __init__(self, module: str, purpose: str) -> None:
        self.module, self.purpose = module, purpose
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.Queue[str] = queue.Queue()
        self.lock = threading.Lock()

    def ask(self, question: Any) -> Any:
        """Return the child's reply to a question; both are JSON.

        Raises:
            Timeout: If it took too long, or the child died.
            Busy: If the machine is too busy.
        """
        with self.lock:
            if self.process is None:
                self._start()
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps(question) + "\n")
                self.process.stdin.flush()
                return json.loads(self._reply(PATIENCE_SECONDS))
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
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
            # Threads that NumPy starts before the child is confined would not be.
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **kept},
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
            remedy = f"see what `python -m {self.module}` prints"
            raise RunStopped(f"The process of {self.purpose} needs, did not start; {remedy}.") from None

    def _reply(self, seconds: float) -> str:
        try:
            line = self.replies.get(timeout=seconds)
        except queue.Empty:
            raise Busy from None
        if not line:
            raise Timeout
        return line


def _forward_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put the lines of a stream into a queue, and "" at its end."""
    with contextlib.suppress(OSError, ValueError):  # it is closed meanwhile
        for line in stream:
            lines.put(line)
    lines.put("")


def ask_all(
    ask: Callable[[Question], Verdict | None], questions: Sequence[Question], slow: Verdict
) -> list[Verdict | None]:
    """Ask every question once, and return the replies in order; None where the machine is too busy.

    Args:
        ask: `Checker.ask`, or a function that calls it.
        questions: What to ask.
        slow: The reply to questions that take too long. After five of them, the rest of the call gets it unseen, so
            that a policy that writes such answers cannot stall its training.
    """
    known: dict[Question, Verdict | None] = {}
    number_slow, busy = 0, False
    for question in dict.fromkeys(questions):
        known[question] = None if busy else slow
        if busy or number_slow == MAX_SLOW:
            continue
        try:
            known[question] = ask(question)
        except Busy:
            busy, known[question] = True, None
        except Timeout:
            number_slow += 1
    return [known[question] for question in questions]


def serve(judge: Callable[[Any], Any]) -> None:
    """Read one JSON value per line, and write what `judge` returns for it: the main function of the child.

    Args:
        judge: Everything that it imports must be loaded already.
    """
    import signal

    from pipeline.rewards.sandbox import confinement

    def limit_time(seconds: float) -> None:
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.setitimer(signal.ITIMER_PROF, seconds)

    # What a judge prints must not pass for a reply.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.chdir(directory)
        confinement.limit_resources(10**6, MEMORY_MB)
        files_confined = confinement.confine_files(directory)
        confinement.drop_privileges(files_confined)
        confinement.confine_calls(files_confined)
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            limit_time(SECONDS)  # of CPU time, after which the kernel ends this process
            reply = judge(question)
            limit_time(0)
            print(json.dumps(reply), file=replies, flush=True)
