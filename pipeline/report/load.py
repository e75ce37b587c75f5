"""Load what a run has written: its record (run.json), its evaluations, its training logs, the shapes of its weights.

Everything that can be read is reported: a missing file is a stage that was not run, a damaged one becomes a note of one
line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import Estimate, finite
from pipeline.evaluation.results import win_rates
from pipeline.files import check_regular, read_shapes
from pipeline.report.labels import stage_info, stage_order

Outcomes = dict[str, tuple[float, float, str]]
"""Example id, followed by the hash of the example's content -> (value, weight, kind)."""

ANNOTATORS = "annotators who do not know which is which"
"""The judge of evaluations that do not name one."""

MACHINE_KEYS = ("hardware", "versions", "commit")
"""Keys of a step's entry in run.json that describe where it ran."""


@dataclass
class Stage:
    """A stage, as read from the files that it left.

    Attributes:
        name: Directory name, such as "2_sft".
        metrics: Metric -> estimate.
        outcomes: Metric -> outcome of each example.
        answers: `{"prompt", "answer"}` of the fixed prompts.
        traces: `{"kind", "problem", "reference", "answer", "correct"}`, the first problem of each kind.
        texts: What the answers of a baseline begin with or have in common, by a key such as "text".
        evaluation_seconds: How long the evaluation took.
        against: The stage that it is compared with in the win rates.
        judge: Who judges these.
        left_out: What there was no data for, one line each.
        cut_off: Data -> how many answers were cut off, as `pipeline.evaluation.results` has it.
        experts: The load of the experts in `layers`, and `documents`, likewise; {} for a dense model.
        overlap: Data -> how many held-out rows are trained on, likewise.
        state: The content of trainer_state.json, with the logged values in `log_history`.
        config: The model's config.json.
        parameters: Number of weights saved, None if there are none.
        active_parameters: Those of them that a token passes: of the experts, only the ones it is routed to.
    """

    name: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    outcomes: dict[str, Outcomes] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    evaluation_seconds: float | None = None
    against: str = ""
    judge: str = ""
    left_out: list[str] = field(default_factory=list)
    cut_off: dict[str, dict[str, int]] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    active_parameters: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged records, oldest first."""
        history = self.state.get("log_history")
        return [record for record in history if isinstance(record, dict)] if isinstance(history, list) else []


@dataclass
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        record: The content of its run.json.
        hardware: The machine of the last training step, {} if it was not recorded.
        versions: Its packages, {} if they were not recorded.
        commit: Its commit of this project, None if it was not recorded.
        stages: The stages by name, in the order of training.
        baselines: What is reached without training, by the names in `pipeline.evaluation.baselines`.
        others: Evaluations with a name -> stage -> metric -> estimate: on other data, or with other settings.
        notes: What could not be read, and steps that ran elsewhere; one line each.
        label: What the run is called, if not by the name of its directory.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    baselines: dict[str, Stage] = field(default_factory=dict)
    others: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def name(self) -> str:
        """The label if there is one, otherwise the name of the directory."""
        return self.label or self.path.resolve().name

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """The entries of the steps in run.json, by name."""
        return {name: step for name, step in _mapping(self.record.get("steps")).items() if isinstance(step, dict)}

    @property
    def against(self) -> str:
        """The stage that others are compared with."""
        return next((stage.against for stage in self.stages.values() if stage.against), "2_sft")

    @property
    def judge(self) -> str:
        """Who judges the win rates, "" if there are none."""
        judged = [stage for stage in self.stages.values() if "win_rate" in stage.metrics]
        return " or ".join(dict.fromkeys(stage.judge or ANNOTATORS for stage in judged))

    @property
    def answering(self) -> list[Stage]:
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
        UserError: If a path is not a run, or has neither an evaluation nor a training log; all such paths are named.
    """
    problems = []
    runs = []
    for path in paths:
        if not path.is_dir():
            problems.append(Problem("RUN", path, "no such directory; make it with `python -m pipeline run RECIPES`"))
            continue
        runs.append(run := load_run(path))
        if not any(stage.metrics or stage.history for stage in run.stages.values()):
            reason = f" ({run.notes[0]})" if run.notes else ""
            remedy = f"has neither an evaluation nor a training log{reason}; run `python -m pipeline evaluate {path}`"
            problems.append(Problem("RUN", path, remedy))
    if problems:
        raise UserError(*problems)
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.label = str(run.path)
    return runs


def load_run(path: Path) -> Run:
    """Load the run in the directory `path`; what cannot be read goes into its `notes`."""
    run = Run(path)
    run.record = _read_object(path / "run.json", run.notes)
    _set_machine(run)
    names = {file.stem for file in path.glob("evaluations/*.json")}
    names |= {file.parent.name for end in ("config", "trainer_state") for file in path.glob(f"[0-9]*_*/{end}.json")}
    names |= {file.parent.parent.name for file in path.glob("[0-9]*_*/checkpoint-*/trainer_state.json")}
    for name in sorted(names, key=stage_order):
        run.stages[name] = _load_stage(run, name)
    for name, rate in win_rates(path, run.against, run.notes).items():
        run.stages.get(name, Stage(name)).metrics["win_rate_people"] = rate
    for file in sorted(path.glob("evaluations/*/*.json"), key=lambda file: (file.parent.name, *stage_order(file.stem))):
        content = _read_object(file, run.notes)
        run.others.setdefault(file.parent.name, {})[file.stem] = dict(_estimates(content, file, run.notes))
    return run


def _set_machine(run: Run) -> None:
    """Take hardware, versions and commit from the last training step; steps that differ from it become a note."""
    facts = {
        name: {key: step[key] for key in MACHINE_KEYS if step.get(key)}
        for name, step in run.steps.items()
        if name != "report" and any(map(step.get, MACHINE_KEYS))
    }
    trained = [name for name in facts if stage_info(name).trained]
    last = max(trained or facts, key=lambda name: str(run.steps[name].get("finished_at") or ""), default=None)
    if last is None:  # older runs have one record for all steps
        whole = {"commit": run.record.get("git_commit"), **run.record}
        shown = {key: whole.get(key) for key in MACHINE_KEYS}
    else:
        shown = facts[last]
    run.hardware, run.versions = _mapping(shown.get("hardware")), _mapping(shown.get("versions"))
    run.commit = shown["commit"] if isinstance(shown.get("commit"), str) else None
    if others := [name for name, found in facts.items() if found != shown]:
        keys = [key for key in MACHINE_KEYS if any(facts[name].get(key) != shown.get(key) for name in others)]
        differing = f"{', '.join(others)} ran with different {' and '.join(keys)} from {last}"
        run.notes.append(f"{run.path / 'run.json'}: {differing}; the report shows those of {last}")


def _load_stage(run: Run, name: str) -> Stage:
    """Load a stage, and the baselines that were measured with it: their figures are named `<baseline>/<metric>`."""
    stage, notes = Stage(name), run.notes

    def owner(figure: str) -> tuple[Stage, str]:
        baseline, _, metric = figure.rpartition("/")
        return run.baselines.setdefault(baseline, Stage(baseline)) if baseline else stage, metric

    evaluation = run.path / "evaluations" / f"{name}.json"
    content = _read_object(evaluation, notes)
    for figure, estimate in _estimates(content, evaluation, notes):
        of, metric = owner(figure)
        of.metrics[metric] = estimate
    for baseline, texts in _mapping(content.get("texts")).items():
        owner(f"{baseline}/")[0].texts = {key: text for key, text in _mapping(texts).items() if isinstance(text, str)}
    stage.experts = _mapping(content.get("experts"))
    stage.answers = _records(content.get("answers"), ("prompt", "answer"))
    stage.traces = _records(content.get("traces"), ("kind", "problem", "answer"))
    stage.evaluation_seconds = finite(content.get("seconds"))
    stage.against, stage.judge = (str(content.get(key) or "") for key in ("against", "judge"))
    left_out = content.get("left_out")
    stage.left_out = [str(line) for line in left_out] if isinstance(left_out, list) else []
    stage.cut_off, stage.overlap = (_counts(content.get(key)) for key in ("cut_off", "overlap"))
    for figure, outcomes in _read_outcomes(evaluation.with_suffix(".jsonl"), notes).items():
        of, metric = owner(figure)
        of.outcomes[metric] = outcomes
    directory = run.path / name
    stage.state = _read_object(_newest_state(directory), notes)
    stage.config = _read_object(directory / "config.json", notes)
    stage.parameters, stage.active_parameters = _count_parameters(directory, stage.config, notes) or (None, None)
    return stage


def _estimates(content: dict[str, Any], file: Path, notes: list[str]) -> Iterator[tuple[str, Estimate]]:
    for figure, entry in _mapping(content.get("metrics")).items():
        try:
            yield figure, Estimate.from_json(entry)
        except ValueError as error:
            if entry is not None:
                notes.append(f"{file}: {figure}: {error}; left out")


def _newest_state(directory: Path) -> Path:
    """Return trainer_state.json of the stage, or that of its newest checkpoint."""
    found = [file for file in directory.glob("checkpoint-*/trainer_state.json") if _step(file) >= 0]
    direct = directory / "trainer_state.json"
    return direct if direct.exists() or not found else max(found, key=_step)


def _step(state: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", state.parent.name)
    return int(number.group(1)) if number else -1


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object; {} if the file does not exist or, with a note, if it is damaged."""
    if not path.exists():
        return {}
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(_one_line(f"{path}: cannot be read, left out: {error}"))
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path}: is not a JSON object; left out")
        return {}
    return content


def _read_outcomes(path: Path, notes: list[str]) -> dict[str, Outcomes]:
    outcomes: dict[str, Outcomes] = {}
    if not path.exists():
        return outcomes
    damaged = 0
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        notes.append(_one_line(f"{path}: cannot be read, left out: {error}"))
        return outcomes
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            metric, key, value = record["metric"], f"{record['id']} {record.get('row', '')}", finite(record["value"])
        except (ValueError, KeyError, TypeError, RecursionError):
            value = None
        if value is None or not isinstance(metric, str):
            damaged += 1
            continue
        # An outcome per byte, for instance, has the number of bytes as its weight.
        weight = finite(record.get("weight"))
        kind = str(record.get("kind", ""))
        outcomes.setdefault(metric, {})[key] = (value, 1.0 if weight is None else weight, kind)
    if damaged:
        notes.append(f"{path}: {damaged} damaged line(s) left out")
    return outcomes


def _count_parameters(directory: Path, config: Mapping[str, Any], notes: list[str]) -> tuple[int, int] | None:
    """Count the weights in safetensors files by their headers, and those a token passes; tied ones are stored once."""
    files = sorted([*directory.glob("model*.safetensors"), *directory.glob("adapter_model*.safetensors")])
    total = experts = 0
    for file in files:
        try:
            check_regular(file)
            for name, shape in read_shapes(file).items():
                total += math.prod(shape)
                experts += math.prod(shape) * (".experts." in name)
        except (OSError, SafetensorError) as error:
            notes.append(_one_line(f"{file}: its header cannot be read, parameters left out: {error}"))
            return None
    available = finite(config.get("num_local_experts")) or finite(config.get("num_experts")) or 1
    chosen = finite(config.get("num_experts_per_tok")) or available
    return (total, round(total - experts * (1 - chosen / available))) if files else None


def _records(content: object, required: tuple[str, ...]) -> list[dict[str, Any]]:
    records = content if isinstance(content, list) else []
    return [record for record in records if isinstance(record, dict) and all(key in record for key in required)]


def _mapping(content: object) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}


def _counts(content: object) -> dict[str, dict[str, Any]]:
    """Return the counts of each kind of data; those that lack one are left out."""
    entries = {key: _mapping(entry) for key, entry in _mapping(content).items()}
    return {
        key: entry
        for key, entry in entries.items()
        if {"answers", "limit"} <= set(entry) or {"rows", "found", "trained_on", "n"} <= set(entry)
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())
