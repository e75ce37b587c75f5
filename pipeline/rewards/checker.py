"""A child process that judges answers, with a strict time limit.

Judges evaluate what a model wrote (`9^{9^{9^9}}`), which may take hours in C code that a Python handler cannot
interrupt. So they run in a child process that is confined (`pipeline.rewards.sandbox.confinement`), limited in memory,
and killed when it takes too much CPU time, so that the verdict does not depend on the load of the machine. The child
starts with the first question and serves until this process ends, or until an answer takes too long.
"""

# One message of JSON each way, over a connection that only these two processes have:
#
#     this process                              the child, `python -m MODULE`
#     Checker.ask
#         ["\\sqrt{8}", "2\\sqrt{2}", false] -> serve(judge): start the timer, judge, stop the timer
#         true                               <-
#
# The kernel ends a child whose timer runs out, which ends the connection. The next question starts another child.

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import RunStopped
from pipeline.rewards.sandbox import confinement

SECONDS = 2.0
"""Limit of CPU time for a question."""
PATIENCE_SECONDS = 30.0
"""Wall-clock limit for an answer. A machine that needs longer for `SECONDS` of CPU time is too busy for a verdict."""


@dataclass
class Checker:
    """A child process that judges answers, started on first use.

    Attributes:
        module: What the child runs, `python -m module`, which calls `serve`.
        purpose: Who needs the process, for the message if it does not start: "math-verify, which math_answer".
        slow: Reply to a question that takes too long. After five of them, the rest of a call gets it without being
            judged, so that a policy that writes such answers cannot stall its training.
        process: The child, or None before the first question and after one that took too long.
        connection: This process's end of the connection to the child.
        lock: Held while a question is asked, because threads share the connection.
    """

    module: str
    purpose: str
    slow: Any
    process: Any = None
    connection: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask_all(self, questions: Sequence[Any]) -> list[Any]:
        """Ask every distinct question, a tuple of JSON values, once. Return a reply to each of `questions`, in order.

        A reply is what the child's `judge` returns, `slow`, or None if the machine is too busy.
        """
        # Questions that are not judged keep the reply `slow`.
        replies = dict.fromkeys(questions, self.slow)
        distinct = list(replies)
        number_slow = 0
        for index, question in enumerate(distinct):
            try:
                replies[question] = self.ask(question)
            except TimeoutError:
                # A busy machine has no verdict on this question, nor on the ones that follow.
                for remaining in distinct[index:]:
                    replies[remaining] = None
                break
            except (EOFError, OSError):
                number_slow += 1
                if number_slow == 5:
                    break
        return [replies[question] for question in questions]

    def ask(self, question: Any) -> Any:
        """Return the child's reply.

        Raises:
            TimeoutError: If the machine is too busy for a verdict.
            EOFError: If judging took longer than `SECONDS`, so that the kernel ended the child. Also an `OSError`.
            RunStopped: If the child does not start.
        """
        with self.lock:
            if self.process is None:
                self.start()
            try:
                self.connection.send_bytes(json.dumps(question).encode())
                if not self.connection.poll(PATIENCE_SECONDS):
                    raise TimeoutError
                return json.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                self.stop()
                raise

    def start(self) -> None:
        """Start the child and wait until it says that it is ready, or raise `RunStopped`."""
        self.connection, child_end = multiprocessing.Pipe()
        with child_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, str(child_end.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[child_end.fileno()],
                cwd=Path(__file__).parents[2],
                # Threads that NumPy starts before the child is confined would not be confined.
                env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll(60) and self.connection.recv_bytes():
                return
        self.stop()
        raise RunStopped(f"The process of {self.purpose} needs, did not start; see `python -m {self.module}`.")

    def stop(self) -> None:
        """Kill the child; the next question starts another."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.process = None


def serve(judge: Callable[[Any], Any]) -> None:
    """Reply to each question with the result of `judge`, until the connection ends: the child's loop.

    The process is confined first, so `judge` must have done all its imports. Limits are tested in
    `tests/rewards/test_functions.py` and `test_task_check.py`.
    """
    connection = Connection(int(sys.argv[1]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory, contextlib.suppress(EOFError):
        os.chdir(directory)
        # The child serves as long as this process lives, so only each question has a limit of time, below.
        confinement.limit_resources(10**6, memory_mb=2048)
        files_confined = confinement.confine_files(directory)
        confinement.drop_privileges(files_confined)
        confinement.confine_calls(files_confined)
        connection.send_bytes(b"ready")
        while True:
            question = json.loads(connection.recv_bytes())
            # The timer counts CPU time. When it expires, the kernel ends this process.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            reply = judge(question)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(reply).encode())
