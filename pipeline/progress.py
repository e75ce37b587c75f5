"""Progress of a step, which it reports to the runner: lines of JSON in the file that `FOURSTAGE_PROGRESS` names."""

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

VARIABLE = "FOURSTAGE_PROGRESS"

_lost: list[dict[str, Any]] = []
_read: list[dict[str, Any]] = []


def report_progress(**facts: Any) -> None:
    """Report facts about the running step. Do nothing without a runner, or in any process but the first.

    A report that cannot be written does not stop the step. May be called in a signal handler.

    Args:
        **facts: `done` of `total` units (by default, updates); `loss` or `reward`; `tokens_per_second`; `stopping`, the
            signal after which it saves; `lost`, see `report_lost`; `evaluated_on`, the split that training is evaluated
            on if it is not the one that its settings name; `read`, see `report_read`; `first_row`, the first training
            row as the model sees it. Omitted facts keep their last values.
    """
    path = os.environ.get(VARIABLE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    line = json.dumps(facts).encode() + b"\n"
    with contextlib.suppress(OSError):
        # Without O_CREAT, no file is created after the runner, which owns it, has ended.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        with open(descriptor, "wb", buffering=0) as file:
            file.write(line)


def report_lost(rows: int, of: int, what: str, remedy: str) -> None:
    """Warn that a step truncates or drops some of its rows. The runner records that for the report.

    Args:
        what: Text after the numbers, such as "pairs are dropped, because both answers are the same".
        remedy: What to do about it.
    """
    logger.warning("%d of %d %s; %s", rows, of, what, remedy)
    _lost.append({"rows": rows, "of": of, "what": what, "remedy": remedy})
    report_progress(lost=_lost)


def report_read(source: str, rows: int | None, held_out: int | None, **columns: list[str]) -> None:
    """Report which rows and columns of a data set a step reads, which `--smoke` shows at its end.

    Args:
        rows: All rows of the split that is trained on, or None if it is a stream, whose rows are not counted.
        held_out: Those of them that are held out, or None if other splits are.
        columns: Those that are `used`; what is `made` of them; and the `others`.
    """
    _read.append({"source": source, "rows": rows, "held_out": held_out, **columns})
    report_progress(read=_read)


@dataclass
class Tally:
    """The work that a step has `done` out of a `total`, if known, in a `unit` (plural)."""

    unit: str
    total: int = 0
    done: int = 0

    def add(self, number: int) -> None:
        """Add `number` to what is done."""
        self.done = min(self.done + number, self.total)
        if self.total:
            report_progress(done=self.done, total=self.total, unit=self.unit)


def time_in_words(seconds: float) -> str:
    """Format seconds for people: "9.4 s", "48 s", "1 min 38 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def short_count(number: float) -> str:
    """Format a count with up to three digits, as in names of models: "135M", "2.7B", "2.8e+18"."""
    if number >= 1e15:
        return f"{number:.1e}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
