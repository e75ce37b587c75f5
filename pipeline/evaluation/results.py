"""The results of an evaluation: the files that it writes, and the table that it prints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import Problem
from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.settings import read_json
from pipeline.files import write_text


@dataclass
class StageResult:
    """Everything measured on one stage.

    Attributes:
        stage: Directory name, such as "2_sft".
        metrics: Metric -> estimate.
        examples: `{"metric", "id", "row", "kind", "value", ...}` for each example of each metric; `row` is a hash of
            its content.
        answers: `{"prompt", "answer"}` of the fixed prompts.
        traces: `{"kind", "problem", "reference", "answer", "correct"}`, the first problem of each kind.
        texts: Baseline -> what its answers begin with or have in common, by a key such as "text".
        opponent: What its answers in the win rates depend on, if others are compared with it; see `matches`.
        against: The stage that it is compared with in the win rates.
        judge: Who judges the win rates, as reports name it.
        left_out: What there is no data for, one line each.
        cut_off: Data -> its `answers`, those `cut off`, and the `limit` in tokens.
        overlap: Data -> how many of its `rows` are `found` in those that a stage trains on, see `find_overlaps`.
        settings: How it was measured.
        seconds: How long it took, loading included.
    """

    stage: str
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
    overlap: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def record(
        self,
        name: str,
        measured: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        *,
        by_kind: Callable[..., Estimate] | None = outcome_mean,
        units: Sequence[Hashable] | None = None,
        extras: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """Add a metric: its estimate, overall and by kind of example, and the value of every example.

        Args:
            name: Name of the metric; that of a baseline is `<baseline>/<metric>`.
            measured: What `compute` of a metric returned.
            rows: The examples, with `id` and `kind`.
            by_kind: Makes the estimate of each kind from the values; None for no estimates by kind. There are none
                either if all rows are of the same kind.
            units: The unit that each row belongs to, if several rows may share one.
            extras: Further fields of each example, its answer for instance.
        """
        values = measured["values"]
        groups: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row["kind"], []).append(index)
        kinds = {}
        if by_kind is not None and len(groups) > 1:
            for kind, members in sorted(groups.items()):
                shared = {} if units is None else {"units": [units[i] for i in members]}
                kinds[kind] = by_kind([values[i] for i in members], **shared)
        low, high = measured["ci95"]
        self.metrics[name] = Estimate(measured["value"], low, high, measured["n"], kinds)
        for row, value, extra in zip(rows, values, extras or [{}] * len(rows), strict=True):
            content = json.dumps(row, sort_keys=True, default=str).encode()
            example = {"metric": name, "id": row["id"], "row": hashlib.sha256(content).hexdigest()[:16]}
            self.examples.append({**example, "kind": row["kind"], "value": float(value), **extra})


WRITTEN = ("answers", "traces", "texts", "opponent", "against", "judge", "left_out", "cut_off", "overlap", "settings")


def check_own(run: Path, stage: str, settings: Mapping[str, Any]) -> list[Problem]:
    """Refuse to replace what the runner measured by what is measured on other data or with other settings.

    `settings` are those of `StageResult`.
    """
    step = read_json(run / "run.json").get("steps", {}).get(f"evaluate_{stage}", {})
    saved = read_json(run / "evaluations" / f"{stage}.json").get("settings")
    if not step.get("finished_at") or not isinstance(saved, dict):
        return []
    now = json.loads(json.dumps(settings, default=str))
    changed = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if not changed:
        return []
    remedy = f"the run's own figures were measured with another {' and '.join(changed)}; give these a name beside them"
    return [Problem("--name", "nothing", remedy)]


def write_result(folder: Path, result: StageResult) -> Path:
    """Write STAGE.jsonl, then STAGE.json, each whole or not at all. Returns the path of the latter."""
    path = folder / f"{result.stage}.json"
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in result.examples]
    write_text(path.with_suffix(".jsonl"), "".join(lines))
    content = {
        "stage": result.stage,
        "metrics": {name: estimate.to_json() for name, estimate in result.metrics.items()},
        **{name: getattr(result, name) for name in WRITTEN},
        "seconds": round(result.seconds, 2),
    }
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return path


def format_table(result: StageResult) -> str:
    """Format the metrics, one per line, with the kinds of examples indented below, and what else is to be said."""
    lines = [f"{result.stage:<30} {'value':>8}  95% interval         n"]
    for name, estimate in result.metrics.items():
        for label, shown in {name: estimate, **{f"  {kind}": part for kind, part in estimate.by_kind.items()}}.items():
            ends = " ".join("       " if end is None else f"{end:>7.3f}" for end in (shown.low, shown.high))
            lines.append(f"{label:<30} {shown.value:>8.3f}  {ends} {shown.n or '':>10}")
    return "\n".join([*lines, *remarks(result.cut_off, result.overlap), *result.left_out])


def remarks(cut_off: Mapping[str, Mapping[str, int]], overlap: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each kind of data with answers that were cut off, or with rows that are trained on."""
    lines = [
        f"{key}: {counts['cut off']} of {counts['answers']} answers were cut off at {counts['limit']} tokens"
        for key, counts in cut_off.items()
        if counts.get("cut off")
    ]
    return lines + [
        f"{key}: {found['found']} of {found['rows']} held-out rows share {found['n']} words in a row, or all their "
        f"words, with the {found['trained_on']} training rows looked at"
        for key, found in overlap.items()
    ]
