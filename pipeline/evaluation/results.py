"""What the evaluation of one stage measured and its training logged, and the evaluation's files."""

import hashlib
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.files import read_json, write_text
from pipeline.files.json_types import with_right_types, wrong_type

Outcomes = dict[str, tuple[float, float, str]]
"""Id of an example, followed by the hash of its content -> (value, weight, kind)."""

WRITTEN = (
    "answers", "traces", "texts", "opponent", "against", "judge", "left_out", "cut_off", "experts", "overlap",
    "settings",
)  # fmt: skip
"""Fields of a `StageResult` that STAGE.json contains unchanged."""


class Answer(TypedDict):
    """An answer to a fixed prompt."""

    prompt: str
    answer: str


class Trace(TypedDict):
    """The answer to a problem, whose `reference` may be a number; `correct` is None if nobody can tell."""

    kind: str
    problem: str
    reference: NotRequired[Any]
    answer: str
    correct: NotRequired[bool | None]


Cut = TypedDict("Cut", {"answers": int, "cut off": NotRequired[int], "limit": int})
"""How many answers there are, how many of them were cut off, and at how many tokens."""


class RoutedText(TypedDict):
    """The tokens of a document as text and, for each layer, the expert that took each of them."""

    pieces: list[str]
    chosen: list[list[int]]


class Experts(TypedDict, total=False):
    """The load of each expert relative to its fair share, by layer, and documents with their experts.

    It is empty for a model without experts.
    """

    layers: list[list[float]]
    documents: list[RoutedText]


Overlap = TypedDict(
    "Overlap", {"rows": int, "found": int, "trained_on": int, "n": int, "in": NotRequired[dict[str, int]]}
)
"""What `overlaps.find_overlaps` returns about one kind of data."""


class Example(TypedDict):
    """A line of STAGE.jsonl."""

    metric: str
    id: Any
    kind: NotRequired[Any]
    value: float
    weight: NotRequired[float]
    length: NotRequired[int]


class Evaluation(TypedDict, total=False):
    """STAGE.json."""

    metrics: dict[str, Any]
    answers: list[Answer]
    traces: list[Trace]
    texts: dict[str, dict[str, str]]
    opponent: str
    against: str
    judge: str
    left_out: list[str]
    cut_off: dict[str, Cut]
    experts: Experts
    overlap: dict[str, Overlap]
    settings: dict[str, Any]
    seconds: float


class TrainerState(TypedDict, total=False):
    """The entries of trainer_state.json that the report reads."""

    global_step: int
    num_input_tokens_seen: float
    total_flos: float
    log_history: list[dict[str, Any]]


class ModelConfig(TypedDict, total=False):
    """The entries of config.json that the report computes with."""

    num_local_experts: int
    num_experts: int
    num_experts_per_tok: int


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
        written_by: Name of the step that wrote it, if its directory does not say which kind of stage it is.
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
    written_by: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, path: Path, notes: list[str]) -> Self:
        """Read STAGE.json, which is `path`, and STAGE.jsonl next to it. Without these files, the result is empty.

        What is damaged is skipped, and a line about it is appended to `notes`.
        """
        content = with_right_types(read_json(path, notes), Evaluation, path, notes)
        result = cls(path.stem, seconds=content.get("seconds"))
        for name, entry in content.get("metrics", {}).items():
            try:
                result.metrics[name] = Estimate.from_json(entry)
            except ValueError as error:
                notes.append(f"{path}: {name}: {error}; skipped")
        for name in WRITTEN:
            setattr(result, name, content.get(name) or getattr(result, name))
        examples = path.with_suffix(".jsonl")
        if not examples.is_file():
            return result
        try:
            # Texts may contain other characters that `splitlines` treats as line ends.
            lines = examples.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
        except ValueError as error:
            notes.append(f"{examples}: cannot be read ({error}); skipped")
            return result
        faults = (wrong_type(row, Example, f"row {number}") for number, row in enumerate(rows, 1))
        fault = next(filter(None, faults), "")
        if fault:
            notes.append(f"{examples}: {fault}; skipped")
        else:
            result.examples = rows
        return result

    def write(self, folder: Path) -> Path:
        """Write STAGE.jsonl, then STAGE.json, each whole or not at all. Return the path of STAGE.json."""
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
        """Add a metric: its estimate, also by kind of example, and the value of each row.

        Args:
            name: Name of the metric, or `<baseline>/<metric>` for a metric of a baseline.
            measured: The value of each example, or what the function of a metric returned: the estimate as
                `Estimate.to_json` returns it, and the `values`.
            rows: The examples, with `id` and `kind`.
            how: Estimates the metric from values, a seed and `units`: for each kind and, unless `measured` contains the
                estimate, for all examples.
            by_kind: Whether to estimate each kind as well, if there are several.
            units: The unit of each row, such as its prompt, if rows that share one are not independent. Intervals are
                then over units. None if each row is its own unit.
            extras: Further fields of each example, its answer for instance.
        """
        if not isinstance(measured, Mapping):
            values = list(map(float, measured))
            measured = how(values, self.seed, units).to_json() | {"values": values}
        values = measured["values"]
        kinds: dict[str, Estimate] = {}
        if by_kind:
            kinds = _estimate_by_kind(values, [row["kind"] for row in rows], how, self.seed, units)
        self.metrics[name] = replace(Estimate.from_json(measured), by_kind=kinds)
        # Two evaluations are compared example by example. If the data change between them, a row with the same number
        # may have other content.
        for row, value, extra in zip(rows, values, extras or [{}] * len(rows), strict=True):
            content = json.dumps(row, sort_keys=True, default=str).encode()
            example = {"metric": name, "id": row["id"], "row": hashlib.sha256(content).hexdigest()[:16]}
            self.examples.append({**example, "kind": row["kind"], "value": float(value), **extra})

    def outcomes(self, metric: str) -> Outcomes:
        """Return the outcome of each example of a metric. The weight of bits per byte is the number of bytes."""
        outcomes = {}
        for example in self.examples:
            if example["metric"] == metric:
                key = f"{example['id']} {example.get('row', '')}"
                outcomes[key] = (example["value"], example.get("weight", 1.0), str(example.get("kind", "")))
        return outcomes

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged records of training, oldest first."""
        return list(self.state.get("log_history", []))

    def take_baselines(self) -> "dict[str, StageResult]":
        """Move the metrics named `<baseline>/<metric>`, with their examples, to results of their own.

        Return the results by the name of the baseline: `elicited` has the metric `pass@1` of "elicited/pass@1".
        """
        baselines: dict[str, StageResult] = {}
        for name in list(self.metrics):
            baseline, slash, metric = name.rpartition("/")
            if not slash:
                continue
            if baseline not in baselines:
                baselines[baseline] = StageResult(baseline, texts={baseline: self.texts.get(baseline, {})})
            baselines[baseline].metrics[metric] = self.metrics.pop(name)
        remaining = []
        for example in self.examples:
            baseline, slash, metric = example["metric"].rpartition("/")
            if not slash:
                remaining.append(example)
            elif baseline in baselines:
                baselines[baseline].examples.append({**example, "metric": metric})
        self.examples = remaining
        return baselines

    def remarks(self) -> list[str]:
        """Return remarks on answers that were cut off, on copies of held-out rows, and on what was not measured."""
        lines = []
        for key, counts in self.cut_off.items():
            if counts.get("cut off"):
                cut = f"{counts['cut off']} of {counts['answers']} answers were cut off at {counts['limit']} tokens"
                lines.append(f"{key}: {cut}")
        for key, overlap in self.overlap.items():
            lines.append(
                f"{key}: {overlap['found']} of {overlap['rows']} held-out rows share {overlap['n']} words in a row, or "
                f"all their words, with the {overlap['trained_on']} training rows looked at{copies_in(overlap)}"
            )
        return lines + self.left_out


def _estimate_by_kind(
    values: Sequence[float],
    kinds: Sequence[str],
    how: Callable[..., Estimate],
    seed: int,
    units: Sequence[Hashable] | None,
) -> dict[str, Estimate]:
    """Return the estimate for each kind of example, or {} if all examples are of one kind.

    Args:
        values: The value of each example.
        kinds: The kind of each example.
        how: Estimates a metric from values, a seed and units.
        seed: Seed of the intervals.
        units: The unit of each example, None if each is its own unit.
    """
    names = sorted(set(kinds))
    if len(names) < 2:
        return {}
    estimates = {}
    for name in names:
        places = [place for place, kind in enumerate(kinds) if kind == name]
        units_of_kind = None
        if units is not None:
            units_of_kind = [units[place] for place in places]
        estimates[name] = how([values[place] for place in places], seed, units_of_kind)
    return estimates


def copies_in(overlap: Mapping[str, Any]) -> str:
    """Return which training data contain copies of held-out rows, as ": pairs 32, text 1", or "" if none do.

    `overlap` is an entry of `StageResult.overlap`.
    """
    counts = ", ".join(f"{name} {count}" for name, count in overlap.get("in", {}).items())
    if not counts:
        return ""
    return f": {counts}"


def format_table(result: StageResult) -> str:
    """Format the metrics, one per line, with the kinds of examples indented below, followed by remarks."""
    lines = [f"{result.name:<30} {'value':>8}  95% interval         n"]
    for name, estimate in result.metrics.items():
        lines.append(_format_line(name, estimate))
        for kind, part in estimate.by_kind.items():
            lines.append(_format_line(f"  {kind}", part))
    return "\n".join([*lines, *result.remarks()])


def _format_line(label: str, estimate: Estimate) -> str:
    """Return a line of the table. Ends of the interval and numbers of examples that are not known are left blank."""
    ends = ["       " if end is None else f"{end:>7.3f}" for end in (estimate.low, estimate.high)]
    return f"{label:<30} {estimate.value:>8.3f}  {' '.join(ends)} {estimate.n or '':>10}"
