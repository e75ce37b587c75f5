"""Try what a model's files ask for in a child process, which can neither hang nor fill the memory of the machine.

A configuration may ask for 10^9 labels, a chat template may never end, and a tokenizer may double each letter sixty
times. None of that can be seen in the files, so it is done first where it can be ended. The child is a fork, which
takes some milliseconds, and whatever it has made ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

import psutil

MAX_LAYERS = 1024
"""More are certainly a mistake: the deepest models in use have a few hundred, and a configuration names each layer."""

SECONDS = 5
"""Seconds of CPU time; building the largest models, without their weights, takes two, and importing them as many."""

MEMORY = 1 << 30
"""Bytes, in addition to those of this process."""

PATIENCE_SECONDS = 30.0
"""Wall-clock time, for a machine that is too busy to give the child its seconds: a quarter of them then suffices for a
verdict, and with less it is left open."""

OUT_OF_MEMORY, OUT_OF_ROOM = 3, 4
"""Exit codes of the child."""

TOO_SLOW, TOO_LARGE, TOO_LONG = "takes too long", "takes too much memory", "gives too long a text"


def exceeds(call: Callable[[], object]) -> str | None:
    """Call a function in a child process with limits of time and memory.

    Args:
        call: The function. Anything but `TOO_LONG` that it returns or raises is ignored; the caller will see it.

    Returns:
        Which limit it exceeds, as the end of a sentence, or None. Only Linux forks safely; elsewhere it is not called.
    """
    if sys.platform != "linux":
        return None
    alive, held = os.pipe()
    with warnings.catch_warnings():
        # Other threads may hold locks, of which a busy child would wait for ever: PATIENCE_SECONDS.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run(call)
    os.close(held)
    ended = select.poll()
    ended.register(alive)
    is_over = False
    try:
        is_over = bool(ended.poll(PATIENCE_SECONDS * 1000))
    finally:
        os.close(alive)
        if not is_over:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if not is_over:
        return TOO_SLOW if seconds > SECONDS / 4 else None
    if os.WIFSIGNALED(status) and seconds > SECONDS - 1:
        return TOO_SLOW
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_ROOM:
        return TOO_LONG
    # A library in C or Rust that gets no memory aborts, or runs out of its stack.
    return TOO_LARGE if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == OUT_OF_MEMORY else None


def _run(call: Callable[[], object]) -> NoReturn:
    """Call a function under limits, and end this process without a word."""
    import faulthandler
    import resource

    code = 0
    try:
        faulthandler.disable()
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silent, stream)
        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_CPU: SECONDS,
            resource.RLIMIT_AS: psutil.Process().memory_info().vms + MEMORY,
        }
        for limit, value in limits.items():
            with contextlib.suppress(ValueError, OSError):  # there is a lower one
                resource.setrlimit(limit, (value, value))
        if call() is TOO_LONG:
            code = OUT_OF_ROOM
    except MemoryError:
        code = OUT_OF_MEMORY
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        code = OUT_OF_MEMORY if "allocate memory" in str(error) else 0
    finally:
        os._exit(code)
