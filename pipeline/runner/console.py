"""The display of a run: a live view of its stages in a terminal, and otherwise a line for each event."""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from pipeline.errors import EXIT_USER_ERROR, EXIT_WAITING
from pipeline.progress import VARIABLE, time_in_words
from pipeline.runner.run_state import RunState
from pipeline.runner.steps import Step

REFRESH_SECONDS = 0.25
PROGRESS_SECONDS = 10
"""Without a live view, a step that takes longer than this prints its progress at each quarter."""
MAX_COLUMNS = 100
"""Maximum width of the live view."""

MARKS = {
    "waiting": (" ", "dim"), "running": ("▸", "bold cyan"), "done": ("✓", "green"), "kept": ("=", "dim"),
    "stopped": ("✗", "bold red"), "for people": ("⏸", "yellow"),
}  # fmt: skip
"""Status of a stage -> its mark and style."""


def is_live(args: argparse.Namespace) -> bool:
    """Return whether to draw a live view: stdout is a terminal, and no option or variable requests plain lines."""
    plain = os.environ.get("CI") or os.environ.get("NO_COLOR") or args.plain or args.verbose
    console = Console()
    # With FORCE_COLOR, rich treats a pipe as interactive. It draws with characters that need UTF.
    return sys.stdout.isatty() and console.is_interactive and console.encoding.startswith("utf") and not plain


class RunConsole:
    """The view of one run, whose steps run one after the other, until `close`.

    A step writes two files, which a thread reads while the step runs:

        logs/2_sft.log        all of its output                          -> --verbose, and the last lines if it fails
        logs/2_sft.progress   a line of JSON for each fact it reports    -> the bar, the loss and the time that is left
    """

    def __init__(self, title: str, state: RunState, args: argparse.Namespace) -> None:
        self.title, self.state, self._args = title, state, args
        # A resumed step appends to its log; the new part begins here.
        self._log_begin = 0
        self._console = Console(highlight=False)
        self._live: Live | None = None
        if is_live(args):
            self._live = Live(console=self._console, get_renderable=self._view, auto_refresh=False)
            self._live.start(refresh=True)

    def close(self) -> None:
        """End the live view; its last state remains on the screen."""
        if self._live is not None and self._live.is_started:
            self._live.refresh()
            self._live.stop()

    def event(self, line: str) -> None:
        """Print an event, unless the live view shows it."""
        if self._live is None:
            print(line)

    def log(self, step: Step) -> Path:
        """Return the log file of a step's output."""
        return self.state.run_dir / "logs" / f"{step.name}.log"

    @contextlib.contextmanager
    def step(self, step: Step, command: str, resumes: bool) -> Iterator[tuple[int, dict[str, str]]]:
        """Show a step while it runs. Yield a descriptor for its output, and variables for reporting progress."""
        log, reports = self.log(step), self.log(step).with_suffix(".progress")
        log.parent.mkdir(parents=True, exist_ok=True)
        reports.write_bytes(b"")
        self.state.start(step)
        with (
            log.open("ab" if resumes else "wb", buffering=0) as output,
            log.open(encoding="utf-8", errors="replace") as printed,
            reports.open(encoding="utf-8") as reported,
        ):
            # Log the command, so that it can be repeated by hand.
            output.write(f"$ {command}\n".encode())
            self._log_begin = printed.seek(0, os.SEEK_END)
            ended = threading.Event()
            watcher = threading.Thread(target=self._follow, args=(reported, printed, ended), daemon=True)
            watcher.start()
            try:
                yield output.fileno(), {VARIABLE: str(reports.absolute())}
            finally:
                ended.set()
                watcher.join()
                reports.unlink(missing_ok=True)

    def _follow(self, reported: IO[str], printed: IO[str], ended: threading.Event) -> None:
        """Show what the running step reports and prints, until it has `ended`."""
        progress, shown, is_last = self.state.progress, 0, False
        while not is_last:
            is_last = ended.wait(REFRESH_SECONDS)
            for line in reported:
                # The last line may be incomplete.
                with contextlib.suppress(ValueError, TypeError, LookupError):
                    progress.update(json.loads(line))
            quarter = 4 * progress.facts["done"] // progress.facts["total"] if progress.facts.get("total") else 0
            if self._args.verbose:
                print(printed.read(), end="", flush=True)
            elif self._live is not None:
                self._live.refresh()
            elif shown < quarter < 4 and progress.elapsed >= PROGRESS_SECONDS:
                shown = quarter
                left = zip(self.state.seconds_left(), ("left", "left of the run"), strict=True)
                times = [f"{time_in_words(seconds)} {what}" for seconds, what in left if seconds is not None]
                print("    " + ", ".join([*self.state.doing.split("  "), *times]))

    def finish(self, step: Step, seconds: float) -> None:
        """Show that a step has finished, and what its stage has reached."""
        for lost in self.state.progress.facts.get("lost", ()):
            self.event(f"    {lost['rows']:,} of {lost['of']:,} {lost['what']}")
        stage = self.state.end(step, seconds, finished=True)
        reached = f"{stage.name}: {stage.figure}, " if stage.figure else ""
        self.event(f"    {reached}{'measured' if step.kind == 'evaluate' else 'done'} in {time_in_words(seconds)}")

    def stop(self, step: Step, seconds: float, code: int, *messages: str) -> None:
        """End the view of a step that was stopped (`code` 0) or failed; print the end of its output and `messages`."""
        self.state.end(step, seconds, finished=False, for_people=code == EXIT_WAITING)
        self.close()
        if code and not self._args.verbose:
            with self.log(step).open(encoding="utf-8", errors="replace") as file:
                file.seek(self._log_begin)
                lines = file.read().splitlines()
            # If a step refuses its input, its message is shown in full.
            print(*lines[0 if code == EXIT_USER_ERROR else -20 :], sep="\n", file=sys.stderr)
        whole = [f"its whole output: {self.log(step)}"] if code not in (0, EXIT_WAITING) else []
        print(*messages, *whole, sep="\n")

    def _view(self) -> RenderableType:
        """Return the current content of the live view: for each stage, its state or figure, and a time."""
        progress, (step_left, run_left) = self.state.progress, self.state.seconds_left()
        columns = (Column(ratio=1, no_wrap=True, overflow="ellipsis"), Column(justify="right", no_wrap=True))
        stages = Table.grid(Column(width=1), Column(no_wrap=True), *columns, padding=(0, 2, 0, 0), expand=True)
        for stage in self.state.stages.values():
            what: RenderableType = stage.note
            when = ""
            if stage.status == "running":
                done, total = progress.facts.get("done", 0), progress.facts.get("total")
                if not total and step_left:
                    # The progress of a step that reports nothing is estimated from its earlier time.
                    done, total = progress.elapsed, progress.elapsed + step_left
                what = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 2, 0, 0), expand=True)
                what.add_row(ProgressBar(total, done, pulse=not total), self.state.doing)
                when = f"{time_in_words(step_left)} left" if step_left else time_in_words(progress.elapsed)
            elif stage.status == "kept":
                what, when = stage.figure, "kept"
            elif stage.status in ("done", "stopped"):
                parts = [str(progress)] if stage.status == "stopped" else [stage.figure, stage.lost]
                what, when = "; ".join(filter(None, parts)), time_in_words(stage.seconds)
            mark, style = MARKS[stage.status]
            dim = "dim" if style == "dim" else ""
            what = Text(what, dim if stage.status == "waiting" else "") if isinstance(what, str) else what
            stages.add_row(Text(mark, style), Text(stage.name, dim), what, Text(when, "dim"))
        lines: list[RenderableType] = [Text(self.title, "bold"), stages]
        if (step := self.state.running) is not None:
            so_far = f"{time_in_words(time.monotonic() - self._args.began)} so far"
            lines.append(Text(so_far if run_left is None else f"{so_far}, about {time_in_words(run_left)} left"))
            lines.append(Text(f"output: {self.log(step)}", "dim", overflow="fold"))
            if number := progress.facts.get("stopping"):
                notice = f"{number}: {step.name} saves after this update; Ctrl-C again stops immediately"
                lines.append(Text(notice, "yellow"))
        return Constrain(Group(*lines), MAX_COLUMNS)


def show_checks(args: argparse.Namespace) -> AbstractContextManager[object]:
    """Show in the live view that the steps are being checked, which takes seconds."""
    return Console().status(f"Checking the steps of {args.recipe}") if is_live(args) else contextlib.nullcontext()
