"""Progress of a step, which it reports to the runner: lines of JSON in the file that `FOURSTAGE_PROGRESS` names."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta

VARIABLE = "FOURSTAGE_PROGRESS"


def report_progress(**facts: float | str) -> None:
    """Report facts about the running step; without a runner, or in another process than the first, do nothing.

    A step is not stopped by a report that cannot be written. May be called in a signal handler.

    Args:
        **facts: `done` of `total` units, such as updates; `loss` or `reward`; `tokens_per_second`; `stopping`, the
            signal after which it saves. Facts that are left out keep their last values.
    """
    path = os.environ.get(VARIABLE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)  # without O_CREAT: the runner may have gone
        try:
            os.write(descriptor, json.dumps(facts).encode() + b"\n")
        finally:
            os.close(descriptor)


def duration(seconds: float) -> str:
    """Format seconds for people: "48 s", "1:17" (minutes and seconds), "2:05:00"."""
    if round(seconds) < 60:
        return f"{max(seconds, 0):.0f} s"
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")
