"""The state of a run in progress: its stages, their main metrics, and the time that is left."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.evaluation.evaluate_yaml import BASE
from pipeline.evaluation.metric_info import metric_info
from pipeline.files import read_json
from pipeline.runner.due import Decisions
from pipeline.runner.steps import Step
from pipeline.stages import STAGES

FEW_ROWS = 30
"""With fewer rows, their number is shown with a metric."""


@dataclass
class Stage:
    """A step of the recipe and, if it writes a model, its evaluation, which measures `metric`."""

    name: str
    # Why the step is due; "" if it has never run.
    note: str = ""
    status: Literal["waiting", "running", "done", "kept", "stopped", "for people"] = "kept"
    seconds: float = 0.0
    # Its main metric, such as "win rate 0.507 -> 0.772".
    metric: str = ""
    # The rows that it truncated or dropped.
    lost: str = ""


@dataclass
class Progress:
    """The running step's reports, and their times, by `time.monotonic`.

    Attributes:
        began: Time at which the step began.
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
        first_time, first_done = self.first
        last_time, last_done = self.last
        if last_done == first_done:
            return None
        seconds_per_unit = (last_time - first_time) / (last_done - first_done)
        seconds = seconds_per_unit * (self.facts["total"] - self.facts["done"])
        return max(seconds - (time.monotonic() - last_time), 0.0)

    def __str__(self) -> str:
        facts = self.facts
        parts: list[str] = []
        if "unit" in facts:
            parts.append(f"{facts['done']:,} of {facts['total']:,} {facts['unit']}")
        elif "done" in facts:
            parts.append(f"{facts['done']:,}/{facts['total']:,}")
        # A trainer with rewards shows them instead of the loss, which then says little.
        if "reward" in facts:
            parts.append(f"reward {facts['reward']:.3g}")
        elif "loss" in facts:
            parts.append(f"loss {facts['loss']:.3g}")
        if "tokens_per_second" in facts:
            parts.append(f"{facts['tokens_per_second']:,} tokens/s")
        return "  ".join(parts)


class RunState:
    """The state of a run in progress.

    Attributes:
        run_dir: Directory of the run.
        stages: What is shown of each stage, by its directory.
        due: The steps that this command runs.
        running: The running step, if any.
        progress: Reports of the running step, or of the last one.
        taken: Seconds of the steps that have finished, by name.
        expected: Seconds that the steps that are due are expected to take, by name.

    Args:
        run_dir: Directory of the run.
        steps: All steps of the run, in order.
        decisions: The steps of this command, and what it does about each.
        measured: Seconds that steps took earlier, by name; without any, those of recipes/pocket serve as a guess.
        is_smoke: Whether this is a smoke run, whose metrics say nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        steps: Sequence[Step],
        decisions: Decisions,
        measured: Mapping[str, float],
        is_smoke: bool = False,
    ) -> None:
        self.run_dir = run_dir
        self._is_smoke = is_smoke
        models = [step for step in steps if step.stage.measured]
        self._aims = {stage_name(step): step.stage.aims for step in models}
        # A stage starts from a model that it needs or, if no setting names one, from one of the first two.
        outputs = {step.name: stage_name(step) for step in models}
        self._starts: dict[str, list[str]] = {}
        for step in models:
            models_read = [outputs[need] for need in step.needs if need in outputs]
            self._starts[stage_name(step)] = [STAGES["random"].directory, BASE, *models_read]
        self.stages: dict[str, Stage] = {}
        for step, decision in decisions:
            directory = stage_name(step)
            name = directory if step.kind == "evaluate" else step.name
            stage = self.stages.setdefault(directory, Stage(name))
            if decision.action == "skip":
                stage.metric = self.main_metric(directory)
            elif stage.status == "kept":
                stage.status = "waiting"
                if decision.reason != "has not run yet":
                    stage.note = decision.reason
        self.due = [step for step, decision in decisions if decision.action != "skip"]
        self.running: Step | None = None
        self.progress = Progress()
        self.taken: dict[str, float] = {}
        self._resumed = {step.name for step, decision in decisions if decision.action in ("resume", "continue")}
        self._is_guess = not measured
        self.expected = {step.name: measured.get(step.name, step.stage.seconds) for step in self.due}

    def start(self, step: Step) -> None:
        """Note that a step begins."""
        self.running = step
        self.progress = Progress(time.monotonic())
        self.stages[stage_name(step)].status = "running"

    def end(self, step: Step, seconds: float, finished: bool, for_people: bool = False) -> Stage:
        """Note that a step has ended after `seconds`, perhaps because it waits `for_people`. Return its stage."""
        directory = stage_name(step)
        stage = self.stages[directory]
        stage.seconds += seconds
        self.running = None
        if for_people and not finished:
            stage.status = "for people"
            stage.note = self.awaited
            return stage
        if not finished:
            stage.status = "stopped"
            stage.note = ""
            return stage
        self.taken[step.name] = seconds
        stage.metric = ""
        if step.kind == "evaluate":
            stage.metric = self.main_metric(directory)
        lost = self.progress.facts.get("lost")
        if lost:
            stage.lost = ", ".join(f"{item['rows']:,} of {item['of']:,} {item['what']}" for item in lost)
        steps = [step for step in self.due if stage_name(step) == directory]
        remaining = [step for step in steps if step.name not in self.taken]
        stage.status = "waiting" if remaining else "done"
        return stage

    def seconds_left(self) -> tuple[float | None, float | None]:
        """Return the seconds left for the running step, by its reports, and for the whole run; None if unknown.

        The steps that are due take their earlier times, scaled by the speed of this run: the time that the steps so
        far have taken, divided by the time that they took earlier.
        """
        running = ""
        step_left = None
        if self.running is not None:
            running = self.running.name
            step_left = self.progress.left
        # A resumed step takes less than its usual time, so it says nothing about the speed of this machine.
        measured = {name: seconds for name, seconds in self.taken.items() if name not in self._resumed}
        if step_left is not None and running not in self._resumed:
            measured[running] = self.progress.elapsed + step_left
        expected = sum(self.expected[name] for name in measured)
        # The expected seconds are from recipes/pocket. Short first steps do not show how long training takes here.
        if self._is_guess and expected <= sum(self.expected.values()) / 20:
            return step_left, None
        speed = sum(measured.values()) / expected if expected else 1.0
        if running and step_left is None and not self._is_guess:
            step_left = max(speed * self.expected[running] - self.progress.elapsed, 0.0)
        # Everything else takes its earlier time, scaled to the speed of this run.
        waiting = sum(self.expected[step.name] for step in self.due if step.name not in (*self.taken, running))
        return step_left, (step_left or 0.0) + speed * waiting

    @property
    def doing(self) -> str:
        """The running step's progress, in one line: "measuring 120 of 400 answers"."""
        progress = str(self.progress)
        if self.running is None or self.running.kind != "evaluate":
            return progress
        return f"measuring {progress}".rstrip()

    @property
    def awaited(self) -> str:
        """What the step that just ended waits for, such as "waits for 12 votes"."""
        facts = self.progress.facts
        if "unit" not in facts:
            return "waits for people"
        number = f"{facts['total'] - facts['done']:,}"
        if facts["done"]:
            number += " more"
        return f"waits for {number} {facts['unit']}"

    def main_metric(self, stage: str) -> str:
        """Return the first aim of a stage that was measured, such as "win rate 0.507 -> 0.772"; "" if none was.

        The first number is the metric of the stage that it starts from, if that stage was measured, too.
        """
        starts = [name for name in reversed(self._starts.get(stage, [])) if name != stage]
        results = [self._metrics(name) for name in (stage, *starts)]
        for metric in self._aims.get(stage) or ("bits_per_byte",):
            entry = results[0].get(metric, {})
            if entry.get("value") is None:
                continue
            info = metric_info(metric)
            values = [result[metric]["value"] for result in results if result.get(metric, {}).get("value") is not None]
            # The values are of the stage, and then of those that it starts from, the nearest first.
            numbers = " -> ".join(f"{value:.{info.digits}f}" for value in reversed(values[:2]))
            text = f"{info.label[:1].lower()}{info.label[1:]} {numbers}"
            # A share of few rows says little. In a smoke run, none says anything.
            if entry.get("n", FEW_ROWS) < FEW_ROWS and not self._is_smoke:
                text += f" (n = {entry['n']})"
            return text
        return ""

    def _metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics that were measured on a stage, {} if it was not evaluated."""
        metrics: dict[str, Any] = read_json(self.run_dir / "evaluations" / f"{stage}.json").get("metrics", {})
        return metrics

    def kept(self, step: Step, code: int) -> str:
        """Say what is kept of a run whose step was stopped by a signal and ended with exit code `code`."""
        facts = self.progress.facts
        if code == 0:
            return f"{step.name}, which had finished, and the steps before it"
        if "stopping" in facts and code == 128 + signal.Signals[facts["stopping"]]:
            return f"{step.name} up to {facts['done']} of {facts['total']}, and the steps before it"
        is_training = step.stage.measured and step.stage.launched
        if is_training and "done" in facts:
            return "the steps before it, and its last checkpoint, if any"
        return "the steps before it"


def stage_name(step: Step) -> str:
    """Return the directory of the stage that a step belongs to: "2_sft" for `evaluate_2_sft`."""
    if step.kind == "evaluate":
        return step.product.stem
    return step.output.name
