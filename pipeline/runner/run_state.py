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
from pipeline.preferences.aims import find_aims
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
    """What the running step has reported, from which its speed is computed. Times are by `time.monotonic`.

    The speed is measured between two reports. The units before `speed_from` are slow, because models are compiled:

        done   80 ------------ 81 --------------------- 90
               initial_done    speed_from               last_report

    Attributes:
        began: Time at which the step began.
        facts: The last value of each fact, see `pipeline.progress`.
        initial_done: Units that were done at the first report; more than 0 if the step was resumed.
        speed_from: Time of the first report of more units than that, and how many they were.
        last_report: Time of the last report, and how many units were done.
    """

    began: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    initial_done: int = 0
    speed_from: tuple[float, int] = (0.0, 0)
    last_report: tuple[float, int] = (0.0, 0)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Add the facts of a report, which replace their earlier values."""
        if "done" in facts:
            self.last_report = (time.monotonic(), facts["done"])
            # Another total means that the step counts something else from now on.
            if facts["total"] != self.facts.get("total"):
                self.initial_done = facts["done"]
            _, measured_from = self.speed_from
            if measured_from <= self.initial_done:
                self.speed_from = self.last_report
        self.facts.update(facts)

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the step still takes at its own speed; None until two reports have shown the speed."""
        first_time, first_done = self.speed_from
        last_time, last_done = self.last_report
        if last_done == first_done:
            return None
        seconds_per_unit = (last_time - first_time) / (last_done - first_done)
        seconds = seconds_per_unit * (self.facts["total"] - self.facts["done"])
        since_report = time.monotonic() - last_time
        return max(seconds - since_report, 0.0)

    def __str__(self) -> str:
        """Return the progress in one line: "120/400  loss 0.5", or "110 of 400 answers"; "" before any report."""
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
        running: The running step, None between two steps.
        progress: Reports of the running step, or of the last one.
        taken: Seconds of the steps that this command has finished, by name.
        expected: Seconds that each step that is due is expected to take on the machine of an earlier run, by name.

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
        settings = [(step.kind, step.values) for step in steps]
        problems = next((values.get("problems") for kind, values in settings if kind == "evaluate"), None)
        self._aims = {stage_name(step): find_aims((step.kind, step.values), settings, problems) for step in models}
        # The models that a stage may start from, the likeliest last: the models that it reads or, if no setting names
        # one, the untrained model or the one from the Hub.
        outputs = {step.name: stage_name(step) for step in models}
        self._initial_models: dict[str, list[str]] = {}
        for step in models:
            models_read = [outputs[need] for need in step.needs if need in outputs]
            self._initial_models[stage_name(step)] = [STAGES["random"].directory, BASE, *models_read]
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
        """Note that a step has ended, and return its stage.

        Args:
            step: The step.
            seconds: How long it ran.
            finished: Whether it is complete; otherwise, it was stopped or has failed.
            for_people: Whether it ended because it waits for people's votes.
        """
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
        # The stage is done once its evaluation has finished as well.
        remaining = [step for step in self.due if stage_name(step) == directory and step.name not in self.taken]
        stage.status = "done"
        if remaining:
            stage.status = "waiting"
        return stage

    def seconds_left(self) -> tuple[float | None, float | None]:
        """Return the seconds left for the running step and for the whole run; each is None if it is unknown.

        The running step is timed by its own reports. A step that waits is expected to take as long as in an earlier
        run, times the slowdown of this run: 60 s become 120 s if the finished steps took twice their earlier time.
        """
        step_left = None
        if self.running is not None:
            step_left = self.progress.seconds_left
        slowdown = self._slowdown(step_left)
        if slowdown is None:
            return step_left, None
        if self.running is not None and step_left is None and not self._is_guess:
            # It reports nothing, so it is expected to take as long as in the earlier run.
            step_left = max(slowdown * self.expected[self.running.name] - self.progress.elapsed, 0.0)
        waiting = [step for step in self.due if step is not self.running and step.name not in self.taken]
        run_left = slowdown * sum(self.expected[step.name] for step in waiting)
        if step_left is not None:
            run_left += step_left
        return step_left, run_left

    def _slowdown(self, step_left: float | None) -> float | None:
        """Return the seconds that the steps of this run take, divided by the seconds that they were expected to take.

        Args:
            step_left: Seconds left for the running step by its own reports, with which it counts as well; None if
                they are unknown.

        Returns:
            The quotient, 1.0 if no step has been timed yet. None if the expected seconds are only a guess, and the
            steps that have been timed are too short to check it.
        """
        seconds = dict(self.taken)
        if self.running is not None and step_left is not None:
            seconds[self.running.name] = self.progress.elapsed + step_left
        # A resumed step takes less than its usual time, so it says nothing about the speed of this machine.
        timed = [name for name in seconds if name not in self._resumed]
        expected = sum(self.expected[name] for name in timed)
        # The guess is the seconds of recipes/pocket. Its short first steps do not show how long training takes here.
        if self._is_guess and expected <= sum(self.expected.values()) / 20:
            return None
        if not expected:
            return 1.0
        return sum(seconds[name] for name in timed) / expected

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
        """Return the main metric of a stage, and how training has changed it: "win rate 0.507 -> 0.772".

        This is the first of the stage's aims that was measured. The earlier value is left out if the model that the
        stage starts from was not measured by it. Return "" if no aim was measured.
        """
        metrics = self._metrics(stage)
        # A model from the Hub (`BASE`) has no aims, but bits per byte.
        for name in self._aims.get(stage) or ("bits_per_byte",):
            entry = metrics.get(name, {})
            if entry.get("value") is None:
                continue
            info = metric_info(name)
            text = f"{info.label[:1].lower()}{info.label[1:]} "
            initial_value = self._initial_value(stage, name)
            if initial_value is not None:
                text += f"{initial_value:.{info.digits}f} -> "
            text += f"{entry['value']:.{info.digits}f}"
            # A share of few rows says little. In a smoke run, none says anything.
            if entry.get("n", FEW_ROWS) < FEW_ROWS and not self._is_smoke:
                text += f" (n = {entry['n']})"
            return text
        return ""

    def _initial_value(self, stage: str, metric: str) -> float | None:
        """Return the value of a metric for the model that a stage starts from, or None if it was not measured."""
        for name in reversed(self._initial_models.get(stage, [])):
            if name == stage:
                continue
            value: float | None = self._metrics(name).get(metric, {}).get("value")
            if value is not None:
                return value
        return None

    def _metrics(self, stage: str) -> dict[str, Any]:
        """Return the metrics that were measured on a stage, {} if it was not evaluated."""
        metrics: dict[str, Any] = read_json(self.run_dir / "evaluations" / f"{stage}.json").get("metrics", {})
        return metrics

    def describe_kept(self, step: Step, code: int) -> str:
        """Return what a run keeps although a signal has stopped it, such as "the steps before it".

        Args:
            step: The step that was running when the signal came.
            code: The exit code with which it ended.
        """
        facts = self.progress.facts
        if code == 0:
            return f"{step.name}, which had finished, and the steps before it"
        # A trainer that has saved after the signal ends with the code of that signal.
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
