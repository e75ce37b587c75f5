"""A child process that judges answers, with a time limit that cannot be evaded.

Judges evaluate what a model wrote (`9^{9^{9^9}}`), for hours and in C code that a Python handler cannot interrupt. So
they run in a child process that is confined (`pipeline.rewards.sandbox.confinement`), limited in memory, and killed
when it takes too much CPU time, so that the verdict does not depend on the load of the machine. The child starts with
the first answer that needs it and serves until this process ends.
"""

# One line of JSON per message:
#
#     this process                              the child, `python -m MODULE`
#     Checker.ask
#         ["\\sqrt{8}", "2\\sqrt{2}", false] -> serve(judge): start the timer, judge, stop the timer
#         true                               <-
#
# The kernel ends a child whose timer runs out; the end of its output is then the reply, and the next question starts
# another child. If no reply comes although the child still has CPU time, the machine is too busy for a verdict.

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import RunStopped
from pipeline.rewards.sandbox import confinement

SECONDS = 2.0
PATIENCE_SECONDS = 30.0
"""Wall-clock time for an answer; a machine that needs longer for `SECONDS` of CPU time is too busy for a verdict."""
MAX_SLOW = 5
START_SECONDS = 60.0
MEMORY_MB = 2048


class Checker:
    """A child process, started when it is first needed.

    Args:
        module: What the child runs, with `python -m`; it calls `serve`.
        purpose: What it does and who needs it, for messages.
    """

    def __init__(self, module: str, purpose: str) -> None:
        self.module = module
        self.purpose = purpose
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.Queue[str] = queue.Queue()
        self.lock = threading.Lock()

    def ask_all(self, questions: Sequence[Any], slow: Any, is_too_long: Callable[[Any], bool]) -> list[Any]:
        """Ask every question once, and return the replies in order; None where the machine is too busy.

        Args:
            questions: What to ask; tuples of what JSON can hold.
            slow: The reply to questions that take too long. After five of them, the rest of the call gets it unseen,
                so that a policy that writes such answers cannot stall its training.
            is_too_long: Whether a question is too long to be asked; it gets `slow` as well.
        """
        replies = dict.fromkeys(questions, slow)
        asked = [question for question in replies if not is_too_long(question)]
        number_slow = 0
        for index, question in enumerate(asked):
            line = self.ask(json.dumps(question))
            if line is None:
                replies.update(dict.fromkeys(asked[index:]))
                break
            if line:
                replies[question] = json.loads(line)
            else:
                number_slow += 1
            if number_slow == MAX_SLOW:
                break
        return [replies[question] for question in questions]

    def ask(self, question: str) -> str | None:
        """Return the child's reply to a line, "" if the child ran out of time, or None if the machine is too busy."""
        line: str | None
        with self.lock:
            if self.process is None:
                self.start()
            assert self.process is not None and self.process.stdin is not None
            try:
                self.process.stdin.write(question + "\n")
                self.process.stdin.flush()
                line = self.replies.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                line = None
            except OSError:
                line = ""
            if not line:
                self.stop()
        return line

    def start(self) -> None:
        """Start the child and wait until it says that it is ready."""
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
        # A thread reads, because Windows cannot wait for a pipe with a time limit.
        self.replies = queue.Queue()
        threading.Thread(target=_forward_lines, args=(self.process.stdout, self.replies), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            if self.replies.get(timeout=START_SECONDS):
                return
        self.stop()
        remedy = f"see what `python -m {self.module}` prints"
        raise RunStopped(f"The process of {self.purpose} needs, did not start; {remedy}.")

    def stop(self) -> None:
        """Kill the child; the next question starts another."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        self.process = None


def _forward_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put the lines of a stream into a queue, and "" at its end."""
    # The stream may be closed meanwhile.
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            lines.put(line)
    lines.put("")


def serve(judge: Callable[[Any], Any]) -> None:
    """Read one JSON value per line, and write what `judge` returns for it: the main function of the child.

    Args:
        judge: Everything that it imports must be loaded already.
    """
    # What a judge prints must not pass for a reply.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Windows lacks timers.
    has_timer = hasattr(signal, "setitimer")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        os.chdir(directory)
        confinement.limit_resources(10**6, MEMORY_MB)
        files_confined = confinement.confine_files(directory)
        confinement.drop_privileges(files_confined)
        confinement.confine_calls(files_confined)
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            # The timer counts CPU time, and the kernel ends this process after it.
            if has_timer:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = judge(question)
            if has_timer:
                signal.setitimer(signal.ITIMER_PROF, 0)
            print(json.dumps(reply), file=replies, flush=True)
