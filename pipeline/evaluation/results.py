"""The results of an evaluation: the files that it writes, and the table that it prints."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.votes import OTHER, OUTCOMES, VOTES_FILE, as_pairs, read_votes, split_of, standing
from pipeline.errors import Problem, UserError
from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.settings import VOTES
from pipeline.files import read_json, write_text


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
        experts: The load of each expert in `layers`, over its fair share, and in `documents` the `pieces` of some texts
            with the expert `chosen` for each, by layer; {} for a dense model.
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
    experts: dict[str, Any] = field(default_factory=dict)
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
        low, high = measured["ci95"] or (None, None)
        self.metrics[name] = Estimate(measured["value"], low, high, measured["n"], kinds)
        for row, value, extra in zip(rows, values, extras or [{}] * len(rows), strict=True):
            content = json.dumps(row, sort_keys=True, default=str).encode()
            example = {"metric": name, "id": row["id"], "row": hashlib.sha256(content).hexdigest()[:16]}
            self.examples.append({**example, "kind": row["kind"], "value": float(value), **extra})


WRITTEN = (
    "answers", "traces", "texts", "opponent", "against", "judge", "left_out", "cut_off", "experts", "overlap",
    "settings",
)  # fmt: skip


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


def held_out_pairs(run: Path, stage: str) -> list[dict[str, Any]]:
    """Return the pairs that a reward model was not trained on, with the preferences of people as labels.

    These are the test split of the votes if it was trained on votes, and all votes otherwise.

    Raises:
        UserError: If the votes of the run are damaged.
    """
    trained_on = read_json(run / stage / "arguments.json").get("dataset_name") or []
    names = [trained_on] if isinstance(trained_on, str) else trained_on
    is_trained = any((Path(name) / VOTES_FILE).is_file() or Path(name).name == VOTES for name in names)
    votes = standing(read_votes(run / VOTES / VOTES_FILE))
    held_out = [vote for vote in votes if not is_trained or split_of(vote["prompt"]) == "test"]
    return [{**pair, "id": number} for number, pair in enumerate(as_pairs(held_out))]


def win_rates(run: Path, against: str, notes: list[str]) -> dict[str, Estimate]:
    """Estimate how often people preferred the answers of a stage to those of another one; ties count one half.

    Args:
        run: The run.
        against: The stage that others are compared with. Two other stages that people compared are reported at the
            later one, if nothing else is.
        notes: Takes a line if the votes are damaged.

    Returns:
        The win rate of each stage, by its name. `by_kind` has one for each opponent, unless that is `against` alone.
    """
    outcomes: dict[str, dict[str, tuple[list[float], list[str]]]] = defaultdict(dict)
    try:
        votes = standing(read_votes(run / VOTES / VOTES_FILE))
    except (UserError, OSError) as error:
        notes.append(f"people's votes are left out: {error}")
        return {}
    for vote in votes:
        models = {"a": vote["model_a"], "b": vote["model_b"]}
        if vote["choice"] not in OUTCOMES or models["a"] == models["b"]:
            continue
        own = max(models, key=lambda side: (models[side] != against, models[side]))
        outcome = OUTCOMES[vote["choice"]]
        values, prompts = outcomes[models[own]].setdefault(models[OTHER[own]], ([], []))
        values.append(outcome if own == "a" else 1 - outcome)
        prompts.append(json.dumps(vote["prompt"]))
    rates = {}
    for stage, opponents in outcomes.items():
        found = {name: outcome_mean(values, units=prompts) for name, (values, prompts) in opponents.items()}
        main = max(found, key=lambda name: (name == against, found[name].n or 0))
        kinds = {} if list(found) == [against] else {f"against {name}": rate for name, rate in found.items()}
        rates[stage] = Estimate(found[main].value, found[main].low, found[main].high, found[main].n, kinds)
    return rates
