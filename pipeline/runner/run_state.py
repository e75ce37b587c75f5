"""The state of a run in progress: its stages, their figures, and the time that is left."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.evaluation.evaluate_yaml import BASE
from pipeline.evaluation.metric_info import metric_info
from pipeline.files import read_json
from pipeline.runner.due import Decision
from pipeline.runner.steps import Step
from pipeline.stages import STAGES

FEW_ROWS = 30


@dataclass
class Stage:
    """A step of the recipe and, if it writes a model, its evaluation, which measures `figure`."""

    name: str
    # Why the step is due; "" if it has never run.
    note: str = ""
    status: Literal["waiting", "running", "done", "kept", "stopped", "for people"] = "kept"
    seconds: float = 0.0
    figure: str = ""
    # The rows that it truncated or dropped.
    lost: str = ""


@dataclass
class Progress:
    """The running step's reports, and their times, by `time.monotonic`.

    Attributes:
        facts: The last value of each fact, see `pipeline.progress`.
        begin: Units done at the first report.
        first, last: Time and number of units of the second report, before which models are compiled, and of the last.
    """

    began: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    begin: int = 0
    first: tuple[float, int] = (0.0, 0)
    last: tuple[float, int] = (0.0, 0)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Process a report."""
        if "done" in facts:
            self.last = (time.monotonic(), facts["done"])
            if facts["total"] != self.facts.get("total"):
                self.begin = facts["done"]
            # The first units are slow, because models are compiled. The speed is measured after them.
            if self.first[1] <= self.begin:
                self.first = self.last
        self.facts.update(facts)

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds that the step still takes at its own speed; None if that is unknown."""
        units = self.last[1] - self.first[1]
        if not units:
            return None
        left = (self.last[0] - self.first[0]) / units * (self.facts["total"] - self.facts["done"])
        return max(left - (time.monotonic() - self.last[0]), 0.0)

    def __str__(self) -> str:
        facts, shown = self.facts, []
        if "unit" in facts:
            shown.append(f"{facts['done']:,} of {facts['total']:,} {facts['unit']}")
        elif "done" in facts:
            shown.append(f"{facts['done']:,}/{facts['total']:,}")
        # A trainer with rewards shows them instead of the loss, which then says little.
        if name := next((name for name in ("reward", "loss") if name in facts), None):
            shown.append(f"{name} {facts[name]:.3g}")
        if "tokens_per_second" in facts:
            shown.append(f"{facts['tokens_per_second']:,} tokens/s")
        return "  ".join(shown)


class RunState:
    """The state of a run: its `stages` by directory, and the seconds `taken` by its steps, by name.

    It is made from all `steps` in order, those that this command runs (`todo`), and the seconds `measured` before.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: Sequence[Step],
        todo: Sequence[tuple[Step, Decision]],
        measured: Mapping[str, float],
        is_smoke: bool = False,
    ) -> None:
        self.run_dir, self._is_smoke = run_dir, is_smoke
        models = [step for step in steps if step.stage.measured]
        self._aims = {stage_name(step): step.stage.aims for step in models}
        # A stage starts from a model that it needs or, if no setting names one, from one of the first two.
        outputs = {step.name: stage_name(step) for step in models}
        needed = {step.name: [outputs[need] for need in step.needs if need in outputs] for step in models}
        first = (STAGES["random"].directory, BASE)
        self._starts = {outputs[name]: [*first, *stages] for name, stages in needed.items()}
        self.stages: dict[str, Stage] = {}
        for step, decision in todo:
            directory = stage_name(step)
            stage = self.stages.setdefault(directory, Stage(directory if step.kind == "evaluate" else step.name))
            if decision.action == "skip":
                stage.figure = self.figure(directory)
            elif stage.status == "kept":
                stage.status = "waiting"
                stage.note = "" if decision.reason == "has not run yet" else decision.reason
        self.due = [step for step, decision in todo if decision.action != "skip"]
        self.running: Step | None = None
        self.progress = Progress()
        self.taken: dict[str, float] = {}
        self._resumed = {step.name for step, decision in todo if decision.action in ("resume", "continue")}
        self._is_guess = not measured
        self.expected = {step.name: measured.get(step.name, step.stage.seconds) for step in self.due}

    def start(self, step: Step) -> None:
        """Note that a step begins."""
        self.running, self.progress = step, Progress(time.monotonic())
        self.stages[stage_name(step)].status = "running"

    def end(self, step: Step, seconds: float, finished: bool, for_people: bool = False) -> Stage:
        """Note that a step has ended after `seconds`, perhaps because it waits `for_people`. Return its stage."""
        directory = stage_name(step)
        stage = self.stages[directory]
        stage.seconds += seconds
        self.running = None
        if not finished:
            stage.status = "for people" if for_people else "stopped"
            stage.note = self.awaited if for_people else ""
            return stage
        self.taken[step.name] = seconds
        stage.figure = self.figure(directory) if step.kind == "evaluate" else ""
        if lost := self.progress.facts.get("lost"):
            stage.lost = ", ".join(f"{item['rows']:,} of {item['of']:,} {item['what']}" for item in lost)
        missing = [other for other in self.due if stage_name(other) == directory and other.name not in self.taken]
        stage.status = "waiting" if missing else "done"
        return stage

    def seconds_left(self) -> tuple[float | None, float | None]:
        """Return the seconds left for the running step, by its reports, and for the whole run; None if unknown."""
        running = self.running.name if self.running is not None else ""
        left = self.progress.left if running else None
        # A resumed step takes less than its usual time, so it says nothing about the speed of this machine.
        taken = {name: seconds for name, seconds in self.taken.items() if name not in self._resumed}
        if left is not None and running not in self._resumed:
            taken[running] = self.progress.elapsed + left
        before = sum(self.expected[name] for name in taken)
        # The expected seconds are from recipes/pocket. Short first steps do not show how long training takes here.
        if self._is_guess and before <= sum(self.expected.values()) / 20:
            return left, None
        speed = sum(taken.values()) / before if before else 1.0
        if running and left is None and not self._is_guess:
            left = max(speed * self.expected[running] - self.progress.elapsed, 0.0)
        # Everything else takes its earlier time, scaled to the speed of this run.
        due = (self.expected[step.name] for step in self.due if step.name not in (*self.taken, running))
        return left, (left or 0.0) + speed * sum(due)

    @property
    def doing(self) -> str:
        """The running step's progress, in one line: "measuring  120 of 400 answers"."""
        measures = self.running is not None and self.running.kind == "evaluate"
        return " ".join(filter(None, ["measuring" if measures else "", str(self.progress)]))

    @property
    def awaited(self) -> str:
        """What the step that just ended waits for, such as "waits for 12 votes"."""
        facts = self.progress.facts
        if "unit" not in facts:
            return "waits for people"
        return f"waits for {facts['total'] - facts['done']:,} {'more ' if facts['done'] else ''}{facts['unit']}"

    def figure(self, stage: str) -> str:
        """Return the first aim of a stage that was measured, such as "win rate 0.507 -> 0.772"; "" if none was.

        The first number is the figure of the stage that it starts from, if that stage was measured, too.
        """
        names = [stage, *(name for name in reversed(self._starts.get(stage, ())) if name != stage)]
        results = [read_json(self.run_dir / "evaluations" / f"{name}.json").get("metrics", {}) for name in names]
        for metric in self._aims.get(stage) or ("bits_per_byte",):
            found = [result.get(metric, {}) for result in results]
            values = [one["value"] for one in found if one.get("value") is not None]
            if found[0].get("value") is not None:
                info = metric_info(metric)
                shown = " -> ".join(f"{value:.{info.digits}f}" for value in reversed(values[:2]))
                # A share of few rows is hardly a figure. In a smoke run, none is.
                few = f" (n = {found[0]['n']})" if found[0].get("n", FEW_ROWS) < FEW_ROWS and not self._is_smoke else ""
                return f"{info.label[:1].lower()}{info.label[1:]} {shown}{few}"
        return ""

    def kept(self, step: Step, code: int) -> str:
        """Say what is kept of a run whose step was stopped by a signal and ended with exit code `code`."""
        facts, trains = self.progress.facts, step.stage.measured and step.stage.launched
        if code == 0:
            return f"{step.name}, which had finished, and the steps before it"
        if "stopping" in facts and code == 128 + signal.Signals[facts["stopping"]]:
            return f"{step.name} up to {facts['done']} of {facts['total']}, and the steps before it"
        return f"the steps before it{', and its last checkpoint, if any' if trains and 'done' in facts else ''}"


def stage_name(step: Step) -> str:
    """Return the directory of the stage that a step belongs to: "2_sft" for `evaluate_2_sft`."""
    return step.product.stem if step.kind == "evaluate" else step.output.name
