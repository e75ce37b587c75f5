"""The display of a run: a live view of its stages in a terminal, and otherwise a line for each event."""

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
from pipeline.files import open_regular
from pipeline.progress import VARIABLE, time_in_words
from pipeline.runner.run_state import RunState, Stage
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


def is_live(plain: bool = False, verbose: bool = False) -> bool:
    """Return whether to draw a live view: stdout is a terminal, and neither an option nor a variable asks for lines."""
    if plain or verbose or os.environ.get("CI") or os.environ.get("NO_COLOR"):
        return False
    console = Console()
    # With FORCE_COLOR, rich treats a pipe as interactive. It draws with characters that need UTF.
    return sys.stdout.isatty() and console.is_interactive and console.encoding.startswith("utf")


class RunConsole:
    """The view of one run, whose steps run one after the other, until `close`.

    A step writes two files, which a thread reads while the step runs:

        logs/2_sft.log        all of its output                          -> --verbose, and the last lines if it fails
        logs/2_sft.progress   a line of JSON for each fact it reports    -> the bar, the loss and the time that is left

    Args:
        title: First line of the live view.
        state: The state of the run, which the view shows and updates.
        began: Time at which the command began, by `time.monotonic`.
        plain: Whether to print lines even in a terminal.
        verbose: Whether to print the steps' output, which implies `plain`.
    """

    def __init__(self, title: str, state: RunState, began: float, plain: bool = False, verbose: bool = False) -> None:
        self.title = title
        self.state = state
        self._began = began
        self._verbose = verbose
        # A resumed step appends to its log; the new part begins here.
        self._log_begin = 0
        self._console = Console(highlight=False)
        self._live: Live | None = None
        if is_live(plain, verbose):
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
        """Show a step while the block runs it.

        Args:
            step: The step.
            command: Its command, which becomes the first line of its log.
            resumes: Whether the step resumes, so that its output is appended to the log.

        Yields:
            A file descriptor for its output, and the environment variable that tells it where to report progress.
        """
        log = self.log(step)
        reports = log.with_suffix(".progress")
        log.parent.mkdir(parents=True, exist_ok=True)
        open_regular(reports, "wb").close()
        self.state.start(step)
        with (
            open_regular(log, "ab" if resumes else "wb") as output,
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
        printed_quarter = 0
        is_last = False
        while not is_last:
            is_last = ended.wait(REFRESH_SECONDS)
            for line in reported:
                # The last line may be incomplete.
                with contextlib.suppress(ValueError, TypeError, LookupError):
                    self.state.progress.update(json.loads(line))
            if self._verbose:
                print(printed.read(), end="", flush=True)
            elif self._live is not None:
                self._live.refresh()
            else:
                printed_quarter = self._print_quarter(printed_quarter)

    def _print_quarter(self, printed: int) -> int:
        """Print the progress of a long step, once it has done one, two or three quarters of its work.

        `printed` is the number of quarters when it was last printed, or 0. Return the number that is printed now.
        """
        progress = self.state.progress
        total = progress.facts.get("total")
        if not total or progress.elapsed < PROGRESS_SECONDS:
            return printed
        quarter: int = 4 * progress.facts["done"] // total
        if not printed < quarter < 4:
            return printed
        parts = self.state.doing.split("  ")
        step_left, run_left = self.state.seconds_left()
        if step_left is not None:
            parts.append(f"{time_in_words(step_left)} left")
        if run_left is not None:
            parts.append(f"{time_in_words(run_left)} left of the run")
        print("    " + ", ".join(parts))
        return quarter

    def finish(self, step: Step, seconds: float) -> None:
        """Show that a step has finished after `seconds`, the rows that it lost, and a metric if it has measured one."""
        for lost in self.state.progress.facts.get("lost", ()):
            self.event(f"    {lost['rows']:,} of {lost['of']:,} {lost['what']}")
        stage = self.state.end(step, seconds, finished=True)
        line = f"{'measured' if step.kind == 'evaluate' else 'done'} in {time_in_words(seconds)}"
        if stage.metric:
            line = f"{stage.name}: {stage.metric}, {line}"
        self.event(f"    {line}")

    def stop(self, step: Step, seconds: float, code: int, *messages: str) -> None:
        """End the live view because a step has not finished, and say why.

        Args:
            step: The step.
            seconds: How long it ran.
            code: 0 if the user has stopped it; `EXIT_WAITING` if it waits for people; otherwise the code with which
                it failed, and the end of its output is printed.
            *messages: Lines to print after that.
        """
        self.state.end(step, seconds, finished=False, for_people=code == EXIT_WAITING)
        self.close()
        if code and not self._verbose:
            with self.log(step).open(encoding="utf-8", errors="replace") as file:
                file.seek(self._log_begin)
                lines = file.read().splitlines()
            if code != EXIT_USER_ERROR:
                # If a step rejects its input, its message is shown in full.
                lines = lines[-20:]
            print(*lines, sep="\n", file=sys.stderr)
        for message in messages:
            print(message)
        if code not in (0, EXIT_WAITING):
            print(f"its whole output: {self.log(step)}")

    def _view(self) -> RenderableType:
        """Draw the live view: the title, a row for each stage, and while a step runs, the times and its output.

        pocket, seed 0, in runs/pocket
        ✓  1_pretrain  bits per byte 2.640 -> 0.183                      1 min 38 s
        ▸  2_sft       ━━━━━━━━━━━━━━━━━━━━━━━━━━  120/400  loss 0.5      48 s left
           3_reward
        3 min 2 s so far, about 5 min 10 s left
        output: runs/pocket/logs/2_sft.log
        """
        step_left, run_left = self.state.seconds_left()
        # A mark, the name, the state of the stage, which is as wide as the rest allows, and a time.
        table = Table.grid(
            Column(width=1),
            Column(no_wrap=True),
            Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            Column(justify="right", no_wrap=True),
            padding=(0, 2, 0, 0),
            expand=True,
        )
        for stage in self.state.stages.values():
            mark, style = MARKS[stage.status]
            name = Text(stage.name)
            if style == "dim":
                name = Text(stage.name, "dim")
            if stage.status == "running":
                content, duration = self._draw_progress(step_left)
            else:
                content, duration = self._describe_stage(stage)
            table.add_row(Text(mark, style), name, content, Text(duration, "dim"))
        lines: list[RenderableType] = [Text(self.title, "bold"), table]
        step = self.state.running
        if step is not None:
            times = f"{time_in_words(time.monotonic() - self._began)} so far"
            if run_left is not None:
                times += f", about {time_in_words(run_left)} left"
            lines.append(Text(times))
            lines.append(Text(f"output: {self.log(step)}", "dim", overflow="fold"))
            signal_name = self.state.progress.facts.get("stopping")
            if signal_name:
                notice = f"{signal_name}: {step.name} saves after this update; Ctrl-C again stops immediately"
                lines.append(Text(notice, "yellow"))
        return Constrain(Group(*lines), MAX_COLUMNS)

    def _draw_progress(self, step_left: float | None) -> tuple[RenderableType, str]:
        """Draw the bar of the running step and what it last reported. Return them and a time: "48 s left".

        If `step_left`, the seconds left for the step, is None, the time is how long it has run: "48 s".
        """
        progress = self.state.progress
        completed = progress.facts.get("done", 0)
        total = progress.facts.get("total")
        if not total and step_left:
            # The progress of a step that reports nothing is estimated from its earlier time.
            completed = progress.elapsed
            total = progress.elapsed + step_left
        row = Table.grid(Column(ratio=1), Column(no_wrap=True), padding=(0, 2, 0, 0), expand=True)
        # Without a total, the bar only shows that something is going on.
        row.add_row(ProgressBar(total, completed, pulse=not total), self.state.doing)
        if step_left:
            return row, f"{time_in_words(step_left)} left"
        return row, time_in_words(progress.elapsed)

    def _describe_stage(self, stage: Stage) -> tuple[Text, str]:
        """Return what the live view says about a stage that is not running, and how long its steps took, or ""."""
        if stage.status == "kept":
            return Text(stage.metric), "kept"
        if stage.status == "stopped":
            return Text(str(self.state.progress)), time_in_words(stage.seconds)
        if stage.status == "done":
            facts = [text for text in (stage.metric, stage.lost) if text]
            return Text("; ".join(facts)), time_in_words(stage.seconds)
        if stage.status == "waiting":
            return Text(stage.note, "dim"), ""
        return Text(stage.note), ""


def show_checks(recipe: Path, plain: bool, verbose: bool) -> AbstractContextManager[object]:
    """Show a spinner during the block, in which the steps are checked for seconds; nothing without a live view."""
    if not is_live(plain, verbose):
        return contextlib.nullcontext()
    return Console().status(f"Checking the steps of {recipe}")
