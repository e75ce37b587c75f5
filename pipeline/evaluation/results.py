"""What the evaluation of one stage measured and its training logged, and the evaluation's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.files import read_json, write_text

Outcomes = dict[str, tuple[float, float, str]]
"""Id of an example, followed by the hash of its content -> (value, weight, kind)."""

WRITTEN = (
    *("answers", "traces", "texts", "opponent", "against", "judge", "left_out", "cut_off", "experts"),
    *("overlap", "settings"),
)
"""Fields that STAGE.json contains unchanged."""


@dataclass
class StageResult:
    """Everything that is known about a stage, or about a baseline that was measured with it.

    Attributes:
        metrics: Metric -> estimate. The metric of a baseline is named `<baseline>/<metric>`.
        examples: `{"metric", "id", "row", "kind", "value", ...}` of each example, where `row` is a hash of its content.
        answers: `{"prompt", "answer"}` of the fixed prompts.
        traces: `{"kind", "problem", "reference", "answer", "correct"}`, the first problem of each kind.
        texts: Baseline -> what its answers begin with or have in common, by a key such as "text".
        opponent: Hash of everything that its answers in win rates depend on, if others are compared with it.
        left_out: What could not be measured, one line each.
        cut_off: Data -> its `answers`, how many of them were `cut off`, and the `limit` in tokens.
        experts: Expert loads relative to the fair share, by `layers`; `documents` as `pieces` and the experts `chosen`.
        overlap: Data -> how many of its `rows` are `found` among the training rows, see `overlaps`.
        seconds: How long the evaluation took, loading included.
        state, config, arguments: The content of trainer_state.json, config.json and arguments.json.
        step: Name of the step that wrote it, if its directory does not say which kind of stage it is.
        parameters, active_parameters: Number of weights saved, and of those that a token passes.
        seed: Seed of its sampled answers and of its intervals.
    """

    name: str
    metrics: dict[str, Estimate] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    opponent: str = ""
    against: str = ""
    judge: str = ""
    left_out: list[str] = field(default_factory=list)
    cut_off: dict[str, dict[str, int]] = field(default_factory=dict)
    experts: dict[str, Any] = field(default_factory=dict)
    overlap: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    step: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, path: Path, notes: list[str]) -> StageResult:
        """Read STAGE.json, which is `path`, and STAGE.jsonl; `notes` takes a line for what is damaged and skipped."""
        content = read_json(path, notes)
        result = cls(path.stem, seconds=content.get("seconds"))
        for name, entry in content.get("metrics", {}).items():
            try:
                result.metrics[name] = Estimate.from_json(entry)
            except ValueError as error:
                notes.append(f"{path}: {name}: {error}; skipped")
        for name in WRITTEN:
            setattr(result, name, content.get(name) or getattr(result, name))
        examples = path.with_suffix(".jsonl")
        try:
            # Texts may contain other characters that `splitlines` treats as line ends.
            lines = examples.read_text(encoding="utf-8").split("\n") if examples.is_file() else []
            result.examples = [json.loads(line) for line in lines if line]
        except ValueError as error:
            notes.append(f"{examples}: cannot be read ({error}); skipped")
        return result

    def write(self, folder: Path) -> Path:
        """Write STAGE.jsonl, then STAGE.json, each whole or not at all. Return the path of the latter."""
        path = folder / f"{self.name}.json"
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples]
        write_text(path.with_suffix(".jsonl"), "".join(lines))
        content = {
            "stage": self.name,
            "metrics": {name: estimate.to_json() for name, estimate in self.metrics.items()},
            **{name: getattr(self, name) for name in WRITTEN},
            "seconds": round(self.seconds or 0.0, 2),
        }
        write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        return path

    def record(
        self,
        name: str,
        measured: Mapping[str, Any] | Sequence[float],
        rows: Sequence[Mapping[str, Any]],
        *,
        how: Callable[..., Estimate] = outcome_mean,
        by_kind: bool = True,
        units: Sequence[Hashable] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Add a metric (`<baseline>/<metric>` of a baseline): its estimate, also by kind, and the value of each row.

        Args:
            measured: What `compute` of a metric returned, or the value of each example.
            rows: The examples, with `id` and `kind`.
            how: Makes an estimate of values.
            by_kind: Whether to estimate each kind as well, if there are several.
            units: The unit that each row belongs to, if several rows may share one.
            extras: Further fields of each example, its answer for instance.
        """
        if not isinstance(measured, Mapping):
            values = list(map(float, measured))
            measured = how(values, self.seed, units).to_json() | {"values": values}
        values, kinds = measured["values"], {}
        names = sorted({row["kind"] for row in rows})
        for kind in names if by_kind and len(names) > 1 else ():
            members = [index for index, row in enumerate(rows) if row["kind"] == kind]
            kinds[kind] = how([values[i] for i in members], units=units and [units[i] for i in members])
        self.metrics[name] = replace(Estimate.from_json(measured), by_kind=kinds)
        # Examples are paired by their number and their content, in case the data change between two evaluations.
        for row, value, extra in zip(rows, values, extras or [{}] * len(rows), strict=True):
            content = json.dumps(row, sort_keys=True, default=str).encode()
            example = {"metric": name, "id": row["id"], "row": hashlib.sha256(content).hexdigest()[:16]}
            self.examples.append({**example, "kind": row["kind"], "value": float(value), **extra})

    def outcomes(self, metric: str) -> Outcomes:
        """Return the outcome of each example of a metric. A value per byte, for instance, is weighted by its bytes."""
        return {
            f"{one['id']} {one.get('row', '')}": (one["value"], one.get("weight", 1.0), str(one.get("kind", "")))
            for one in self.examples
            if one["metric"] == metric
        }

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged records of training, oldest first."""
        return list(self.state.get("log_history", []))

    def take_baselines(self) -> dict[str, StageResult]:
        """Move the figures named `<baseline>/<metric>`, with their examples and texts, to results of their own."""
        found: dict[str, StageResult] = {"": self}
        metrics, examples, self.metrics, self.examples = self.metrics, self.examples, {}, []
        # "elicited/pass@1" is the figure `pass@1` of the baseline `elicited`.
        for figure, estimate in metrics.items():
            baseline, _, metric = figure.rpartition("/")
            if baseline not in found:
                found[baseline] = StageResult(baseline, texts={baseline: self.texts.get(baseline, {})})
            found[baseline].metrics[metric] = estimate
        for example in examples:
            baseline, _, metric = example["metric"].rpartition("/")
            if baseline in found:
                found[baseline].examples.append({**example, "metric": metric})
        del found[""]
        return found

    def remarks(self) -> list[str]:
        """Return remarks on truncated answers, on held-out rows in the training data, and on what was not measured."""
        lines = [
            f"{key}: {counts['cut off']} of {counts['answers']} answers were cut off at {counts['limit']} tokens"
            for key, counts in self.cut_off.items()
            if counts.get("cut off")
        ]
        lines += [
            f"{key}: {found['found']} of {found['rows']} held-out rows share {found['n']} words in a row, or all their "
            f"words, with the {found['trained_on']} training rows looked at{copies_in(found)}"
            for key, found in self.overlap.items()
        ]
        return lines + self.left_out


def copies_in(found: Mapping[str, Any]) -> str:
    """Return where in the training data copies were found, and how many: ": pairs 32, text 1"."""
    counts = ", ".join(f"{name} {count}" for name, count in found.get("in", {}).items())
    return f": {counts}" if counts else ""


def format_table(result: StageResult) -> str:
    """Format the metrics, one per line, with the kinds of examples indented below, followed by remarks."""
    lines = [f"{result.name:<30} {'value':>8}  95% interval         n"]
    for name, estimate in result.metrics.items():
        for label, shown in {name: estimate, **{f"  {kind}": part for kind, part in estimate.by_kind.items()}}.items():
            ends = " ".join("       " if end is None else f"{end:>7.3f}" for end in (shown.low, shown.high))
            lines.append(f"{label:<30} {shown.value:>8.3f}  {ends} {shown.n or '':>10}")
    return "\n".join([*lines, *result.remarks()])
