"""Loading what a run has written: its manifest, its evaluations, its training logs, its weights' shapes.

Whatever is there is reported: a file that is missing is a stage that was not run, a file that is damaged
becomes a one-line note and the rest goes on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import Estimate, finite
from pipeline.models.weights import read_shapes
from pipeline.report.labels import stage_order

Outcomes = dict[str, tuple[float, float, str]]
"""Example id -> (value, weight, kind)."""


@dataclass
class Stage:
    """What one stage left on disk.

    Args:
        name: directory name, such as "2_sft".
        metrics: metric -> estimate.
        outcomes: metric -> outcome of each example.
        answers: `{"prompt", "answer"}` of the fixed prompts.
        traces: `{"kind", "problem", "reference", "answer", "correct"}`, the first problem of each kind.
        evaluation_seconds: how long the evaluation took.
        state: trainer_state.json, with the logged values in `log_history`.
        config: config.json of the model.
        parameters: number of weights saved, None if there are none.
    """

    name: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    evaluation_seconds: float | None = None
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged records, oldest first."""
        history = self.state.get("log_history")
        return [record for record in history if isinstance(record, dict)] if isinstance(history, list) else []


@dataclass
class Run:
    """A run directory.

    Args:
        path: where it is.
        manifest: its run.json.
        stages: by name, in the order of training.
        notes: what could not be read, one line each.
        label: what it is called, if not by its directory's name.
    """

    path: Path
    manifest: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.label or self.path.resolve().name

    @property
    def speakers(self) -> list[Stage]:
        """The stages whose model answered the fixed prompts."""
        return [stage for stage in self.stages.values() if stage.answers]

    @property
    def traced(self) -> tuple[Stage, Stage] | None:
        """The stages whose reasoning is compared: the last one with traces, and the one before it."""
        found = [stage for stage in self.stages.values() if stage.traces]
        return (found[-2], found[-1]) if len(found) > 1 else None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Load every run.

    Raises:
        UserError: naming every path that is no run, or holds neither an evaluation nor a training log.
    """
    problems = []
    runs = []
    for path in paths:
        if not path.is_dir():
            problems.append(Problem("RUN", path, "no such directory; make it with `python -m pipeline run RECIPES`"))
            continue
        run = load_run(path)
        runs.append(run)
        if not any(stage.metrics or stage.history for stage in run.stages.values()):
            reason = f" ({run.notes[0]})" if run.notes else ""
            remedy = f"holds no evaluation and no training log{reason}; run `python -m pipeline evaluate {path}`"
            problems.append(Problem("RUN", path, remedy))
    if problems:
        raise UserError(*problems)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.label = str(run.path)
    return runs


def load_run(path: Path) -> Run:
    """Load the run in the directory `path`; what cannot be read is told in the run's `notes`."""
    run = Run(path)
    run.manifest = _read_object(path / "run.json", run.notes)
    names = {file.stem for file in path.glob("evaluations/*.json")}
    names |= {file.parent.name for file in path.glob("[0-9]*_*/config.json")}
    names |= {file.parent.name for file in path.glob("[0-9]*_*/trainer_state.json")}
    names |= {file.parent.parent.name for file in path.glob("[0-9]*_*/checkpoint-*/trainer_state.json")}
    for name in sorted(names, key=stage_order):
        run.stages[name] = _load_stage(path, name, run.notes)
    return run


def _load_stage(run: Path, name: str, notes: list[str]) -> Stage:
    stage = Stage(name)
    evaluation = run / "evaluations" / f"{name}.json"
    content = _read_object(evaluation, notes)
    for metric, entry in _mapping(content.get("metrics")).items():
        try:
            stage.metrics[metric] = Estimate.from_json(entry)
        except ValueError as error:
            if entry is not None:
                notes.append(f"{evaluation}: {metric}: {error}; left out")
    stage.answers = _records(content.get("answers"), ("prompt", "answer"))
    stage.traces = _records(content.get("traces"), ("kind", "problem", "answer"))
    stage.evaluation_seconds = finite(content.get("seconds"))
    stage.outcomes = _read_outcomes(evaluation.with_suffix(".jsonl"), notes)
    directory = run / name
    stage.state = _read_object(_newest_state(directory), notes)
    stage.config = _read_object(directory / "config.json", notes)
    stage.parameters = _count_parameters(directory, notes)
    return stage


def _newest_state(directory: Path) -> Path:
    """trainer_state.json of the stage, or else of its newest checkpoint."""
    found = [file for file in directory.glob("checkpoint-*/trainer_state.json") if _step(file) >= 0]
    direct = directory / "trainer_state.json"
    return direct if direct.exists() or not found else max(found, key=_step)


def _step(state: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", state.parent.name)
    return int(number.group(1)) if number else -1


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no file, or, with a note, if it is damaged."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(_one_line(f"{path}: cannot be read, left out: {error}"))
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path}: is no JSON object; left out")
        return {}
    return content


def _read_outcomes(path: Path, notes: list[str]) -> dict[str, Outcomes]:
    outcomes: dict[str, Outcomes] = {}
    if not path.exists():
        return outcomes
    damaged = 0
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        notes.append(_one_line(f"{path}: cannot be read, left out: {error}"))
        return outcomes
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            metric, key, value = record["metric"], str(record["id"]), finite(record["value"])
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        if value is None or not isinstance(metric, str):
            damaged += 1
            continue
        # Outcomes that are totals say of how much: the bits of a document of so many bytes.
        weight = finite(record.get("weight"))
        outcomes.setdefault(metric, {})[key] = (
            value,
            1.0 if weight is None else weight,
            str(record.get("kind", "")),
        )
    if damaged:
        notes.append(f"{path}: {damaged} damaged line(s) left out")
    return outcomes


def _count_parameters(directory: Path, notes: list[str]) -> int | None:
    """Count the weights in the directory's safetensors files by their headers; tied weights are stored once."""
    files = sorted([*directory.glob("model*.safetensors"), *directory.glob("adapter_model*.safetensors")])
    total = 0
    for file in files:
        try:
            total += sum(math.prod(shape) for shape in read_shapes(file).values())
        except (OSError, SafetensorError) as error:
            notes.append(_one_line(f"{file}: its header cannot be read, parameters left out: {error}"))
            return None
    return total if files else None


def _records(content: object, required: tuple[str, ...]) -> list[dict[str, Any]]:
    records = content if isinstance(content, list) else []
    return [record for record in records if isinstance(record, dict) and all(key in record for key in required)]


def _mapping(content: object) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}


def logged(stage: Stage, key: str, x: str = "step") -> list[tuple[float, float]]:
    """The points (x, value) at which the stage logged both `key` and `x`, in the order of logging."""
    return list(_points(stage, key, x))


def _points(stage: Stage, key: str, x: str) -> Iterator[tuple[float, float]]:
    for record in stage.history:
        abscissa, value = finite(record.get(x)), finite(record.get(key))
        if abscissa is not None and value is not None:
            yield abscissa, value


def last_logged(stage: Stage, key: str) -> float | None:
    """The last finite value that the stage logged under `key`."""
    points = [value for record in stage.history if (value := finite(record.get(key))) is not None]
    return points[-1] if points else None


def _one_line(text: str) -> str:
    return " ".join(text.split())
