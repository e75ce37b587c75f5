"""Systems without fork, resource limits and timers, such as Windows: rewards import, and code is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, pkgutil, signal, sys
import trl.trainer.utils  # before the system loses its functions, which the libraries do not expect
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for module, names in {
    os: ("fork", "setsid", "killpg", "geteuid", "setuid", "set_blocking", "waitstatus_to_exitcode"),
    signal: ("setitimer", "SIGKILL", "pthread_kill"),
}.items():
    for name in names:
        delattr(module, name)
import pipeline.rewards
for module in pkgutil.walk_packages(pipeline.rewards.__path__, "pipeline.rewards."):
    __import__(module.name)
from pipeline.errors import RunStopped, UserError
from pipeline.rewards.functions import code_tests, exact_answer
from pipeline.rewards.grading import grade
from pipeline.rewards.loading import load_rewards
print(exact_answer(["The answer is 3."], ["3"]), grade(["a fox"], [{"require": [["fox"]], "test": ""}]))
for action in (lambda: load_rewards(["code_tests"]), lambda: code_tests(["x = 1"], ["assert x"]),
               lambda: grade(["x = 1"], [{"test": "assert x"}])):
    try:
        action()
    except (RunStopped, UserError) as error:
        print(error)
"""


def test_rewards_work_without_posix() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rewards, loading, running, grading = done.stdout.splitlines()
    assert rewards == "[1.0] [True]"
    assert loading.startswith("reward_funcs: code_tests: cannot run code here")
    assert running == grading and "os.fork" in running
