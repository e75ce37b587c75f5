"""What an evaluation leaves on disk and on the screen."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import write_text


@dataclass
class StageResult:
    """Everything measured on one stage.

    Args:
        stage: directory name, such as "2_sft".
        metrics: metric -> `{"value", "ci95", "n"}`, some with `by_kind`.
        examples: `{"metric", "id", "kind", "value", ...}`, one for each example of each metric.
        answers: `{"prompt", "answer"}` of the fixed prompts.
        traces: `{"kind", "problem", "reference", "answer", "correct"}`, the first problem of each kind.
        seconds: how long it took, loading included.
    """

    stage: str
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    traces: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def write(run: Path, result: StageResult) -> Path:
    """Write RUN/evaluations/STAGE.jsonl, then .json, each whole or not at all; return the latter's path."""
    folder = run / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in result.examples]
    write_text(folder / f"{result.stage}.jsonl", "".join(lines))
    content = {
        "stage": result.stage,
        "metrics": result.metrics,
        "answers": result.answers,
        "traces": result.traces,
        "seconds": round(result.seconds, 2),
    }
    path = folder / f"{result.stage}.json"
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return path


def table(result: StageResult) -> str:
    """The metrics of `result`, a line each, kinds of examples indented below."""
    lines = [f"{result.stage:<30} {'value':>8}  95% interval         n"]
    for name, entry in result.metrics.items():
        lines.append(_line(name, entry))
        lines.extend(_line(f"  {kind}", part) for kind, part in entry.get("by_kind", {}).items())
    return "\n".join(lines)


def _line(name: str, entry: dict[str, Any]) -> str:
    low, high = entry["ci95"]
    return f"{name:<30} {entry['value']:>8.3f}  {low:>7.3f} {high:>7.3f} {entry['n']:>10}"
