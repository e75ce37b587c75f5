"""report.md: the report as Markdown, for a README or a model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.differences import Difference
from pipeline.report.labels import stage_info
from pipeline.report.load import Run
from pipeline.report.targets import Verdict
from pipeline.report.text import duration, interval, magnitude, markdown, number, signed

ANSWER_CHARACTERS = 160
"""An answer in a table is cut at this length; the page shows more."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def to_markdown(run: Run, found: Sequence[Difference], verdicts: Sequence[Verdict], summary: dict[str, Any]) -> str:
    """The figures, gains, promises, answers and costs of a run.

    Args:
        run: the run.
        found: its paired differences.
        verdicts: the promises that it is held to.
        summary: the content of its metrics.json.
    """
    lines = [f"# {markdown(run.name)}", ""]
    lines += _promises(verdicts)
    lines += [f"- {markdown(note)}" for note in run.notes] + ([""] if run.notes else [])
    lines += _figures(run) + _gains(found) + _answers(run) + _traces(run) + _costs(summary)
    return "\n".join(lines).rstrip() + "\n"


def _promises(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return []
    missed = [item for item in verdicts if not item.kept]
    if not missed:
        return [f"All {len(verdicts)} promised figures are kept.", ""]
    lines = [f"**{len(missed)} of {len(verdicts)} promised figures fall short:**", ""]
    return [
        *lines,
        *(f"- {markdown(str(item.promise))}; measured {number(item.measured)}" for item in missed),
        "",
    ]


def _figures(run: Run) -> list[str]:
    stages = [stage for stage in run.stages.values() if stage.metrics]
    if not stages:
        return []
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        digits = metric_info(metric).digits
        row = [markdown(metric_info(metric).label)]
        for stage in stages:
            measurement = stage.metrics.get(metric)
            if measurement is None:
                row.append("–")
                continue
            value = number(measurement.value, digits)
            value = f"**{value}**" if metric in stage_info(stage.name).aims else value
            ends = interval(measurement, digits)
            row.append(f"{value} ({ends})" if ends else value)
        rows.append(row)
    header = ["metric", *(f"`{stage.name}`" for stage in stages)]
    intro = "Held-out data, with 95% intervals; in bold what the stage is trained for."
    return ["## Every metric on every stage", "", intro, "", *table(header, rows)]


def _gains(found: Sequence[Difference]) -> list[str]:
    if not found:
        return []
    rows = []
    for item in found:
        digits = metric_info(item.metric).digits
        rows.append(
            [
                f"`{item.stage}` − `{item.before}`",
                markdown(metric_info(item.metric).label),
                "aim" if item.aim else "",
                signed(item.change.value, digits),
                interval(item.change, digits, sign=True),
            ]
        )
    header = ["stages", "metric", "trained for", "change", "95% interval"]
    return [
        "## What each stage gained, and what it cost",
        "",
        "Paired on the same examples.",
        "",
        *table(header, rows),
    ]


def _answers(run: Run) -> list[str]:
    speakers = run.speakers
    if not speakers:
        return []
    prompts = list(dict.fromkeys(str(item["prompt"]) for stage in speakers for item in stage.answers))
    rows = []
    for prompt in prompts:
        row = [markdown(prompt)]
        for stage in speakers:
            given = [str(item["answer"]) for item in stage.answers if str(item["prompt"]) == prompt]
            row.append(markdown(given[0], ANSWER_CHARACTERS) if given else "–")
        rows.append(row)
    header = ["prompt", *(f"`{stage.name}`" for stage in speakers)]
    return ["## The same prompts, answered by each stage", "", *table(header, rows)]


def _traces(run: Run) -> list[str]:
    if run.traced is None:
        return []
    before, after = run.traced
    earlier = {str(item["problem"]): item for item in before.traces}
    rows = []
    for item in after.traces:
        sides = [earlier.get(str(item["problem"]), {}), item]
        answers = [markdown(str(side.get("answer", "–"))) + _mark(side.get("correct")) for side in sides]
        rows.append([markdown(str(item["problem"])), markdown(str(item.get("reference", ""))), *answers])
    header = ["problem", "right answer", f"`{before.name}`", f"`{after.name}`"]
    intro = "The first held-out problem of each kind, answered greedily."
    return ["## Reasoning, before and after", "", intro, "", *table(header, rows)]


def _mark(correct: object) -> str:
    return {True: " ✓", False: " ✗"}.get(correct, "") if isinstance(correct, bool) else ""


def _costs(summary: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"`{name}`",
            duration(taken),
            magnitude(summary["tokens"].get(name)),
            magnitude(summary["flops"].get(name)),
            magnitude(summary["parameters"].get(name)),
        ]
        for name, taken in summary["seconds"].items()
    ]
    lines = ["## Time and compute", ""]
    if rows:
        total = duration(sum(summary["seconds"].values()))
        lines += table(["step", "time", "tokens", "FLOPs", "parameters"], [*rows, ["together", total, "", "", ""]])
    facts = {
        **summary["hardware"],
        **summary["versions"],
        "seed": summary["seed"],
        "commit": summary["commit"],
    }
    known = [f"{markdown(str(key))} {markdown(str(value))}" for key, value in facts.items() if value is not None]
    return [*lines, "; ".join(known)]
