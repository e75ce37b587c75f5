"""The report over several runs of one recipe, usually under several seeds: mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.files import write_text
from pipeline.report.curves import overlay
from pipeline.report.differences import Difference
from pipeline.report.labels import stage_info, stage_order, step_order
from pipeline.report.load import Run
from pipeline.report.markdown import table
from pipeline.report.page import draw, render
from pipeline.report.summary import commit, seconds, write_json
from pipeline.report.tables import show_verdicts
from pipeline.report.targets import Promise, Verdict, judge
from pipeline.report.text import duration, markdown, number, signed

Spread = dict[str, Any]
"""`mean`, `sd`, `min`, `max`, `n` and `values`, the last with None for a run that lacks the figure."""


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and spread of the figures that there are, at least one; `sd` (n - 1) is None for a single one."""
    known = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(known),
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "min": min(known),
        "max": max(known),
        "n": len(known),
        "values": list(values),
    }


def write_seeds(
    runs: Sequence[Run],
    found: Sequence[Sequence[Difference]],
    promises: Sequence[Promise],
    directory: Path,
) -> Path:
    """Write index.html, metrics.json and report.md over several runs.

    Args:
        runs: at least two.
        found: the paired differences of each.
        promises: what each run is held to.
        directory: where to.

    Returns:
        The path of index.html.
    """
    stages = _by_stage_and_metric(
        [{name: {m: x.value for m, x in stage.metrics.items()} for name, stage in run.stages.items()} for run in runs]
    )
    changes = _by_stage_and_metric([_changes(of_run) for of_run in found])
    taken = [seconds(run) for run in runs]
    times = {name: spread([run.get(name) for run in taken]) for name in _union(taken, step_order)}
    judged = [judge(run, of_run, promises) for run, of_run in zip(runs, found, strict=True)]
    missed = _missed(runs, judged)
    summary = {
        "runs": [{"run": run.name, "seed": run.manifest.get("seed"), "commit": commit(run)} for run in runs],
        "stages": stages,
        "differences": changes,
        "seconds": times,
        "promises": [
            {"run": run.name, "promise": str(item.promise), "measured": item.measured, "kept": item.kept}
            for run, verdicts in zip(runs, judged, strict=True)
            for item in verdicts
        ],
        "notes": [note for run in runs for note in run.notes],
    }
    write_json(directory / "metrics.json", summary)
    write_text(directory / "report.md", _markdown(runs, stages, changes, missed, times))
    kept = [item for verdicts in judged for item in show_verdicts(verdicts) if item["kept"]]
    content = {
        "title": f"{len(runs)} runs: Fourstage report",
        "headline": f"{len(runs)} runs: mean and spread",
        "facts": [label(run) for run in runs],
        "names": [run.name for run in runs],
        "verdicts": missed + kept,
        "notes": summary["notes"],
        "figures": _rows(stages, number),
        "changes": _rows(changes, signed),
        "charts": draw(overlay(runs)),
        "times": _times(times, taken),
        "paths": [str(run.path / "report" / "index.html") for run in runs],
    }
    write_text(directory / "index.html", render("seeds.html.jinja", content))
    return directory / "index.html"


def label(run: Run) -> str:
    """The run's name and seed."""
    seed = run.manifest.get("seed")
    return run.name if seed is None else f"{run.name} (seed {seed})"


def _changes(found: Sequence[Difference]) -> dict[str, dict[str, float]]:
    changes: dict[str, dict[str, float]] = {}
    for item in found:
        changes.setdefault(item.stage, {})[item.metric] = item.change.value
    return changes


def _union(tables: Iterable[Mapping[str, Any]], order: Any) -> list[str]:
    return sorted({name for entries in tables for name in entries}, key=order)


def _by_stage_and_metric(tables: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Spread]]:
    """One table of stage -> metric -> value for each run, as stage -> metric -> spread over the runs."""
    result: dict[str, dict[str, Spread]] = {}
    for stage in _union(tables, stage_order):
        of_stage = [entries.get(stage, {}) for entries in tables]
        spreads = {
            metric: spread([values.get(metric) for values in of_stage]) for metric in _union(of_stage, metric_order)
        }
        if spreads:
            result[stage] = spreads
    return result


def _missed(runs: Sequence[Run], judged: Sequence[Sequence[Verdict]]) -> list[dict[str, Any]]:
    return [
        {**item, "promise": f"{label(run)}: {item['promise']}"}
        for run, verdicts in zip(runs, judged, strict=True)
        for item in show_verdicts(verdicts)
        if not item["kept"]
    ]


def _rows(stages: Mapping[str, Mapping[str, Spread]], shown: Any) -> list[dict[str, Any]]:
    groups = []
    for stage, metrics in stages.items():
        rows = []
        for metric, figures in metrics.items():
            info = metric_info(metric)
            rows.append(
                {
                    "label": info.label,
                    "aim": metric in stage_info(stage).aims,
                    "mean": shown(figures["mean"], info.digits),
                    "sd": number(figures["sd"], info.digits),
                    "lowest": shown(figures["min"], info.digits),
                    "highest": shown(figures["max"], info.digits),
                    "values": ["–" if x is None else shown(x, info.digits) for x in figures["values"]],
                }
            )
        groups.append({"title": stage_info(stage).title, "stage": stage, "rows": rows})
    return groups


def _times(times: Mapping[str, Spread], taken: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    everything = {**times}
    if times:
        everything["together"] = spread([sum(run.values()) if run else None for run in taken])
    rows = [
        {
            "label": name,
            "aim": False,
            "mean": duration(figures["mean"]),
            "sd": duration(figures["sd"]),
            "lowest": duration(figures["min"]),
            "highest": duration(figures["max"]),
            "values": [duration(value) for value in figures["values"]],
        }
        for name, figures in everything.items()
    ]
    return [{"title": "All steps", "stage": "", "rows": rows}]


def _markdown(
    runs: Sequence[Run],
    stages: Mapping[str, Mapping[str, Spread]],
    changes: Mapping[str, Mapping[str, Spread]],
    missed: Sequence[Mapping[str, Any]],
    times: Mapping[str, Spread],
) -> str:
    lines = [f"# {len(runs)} runs", "", ", ".join(markdown(label(run)) for run in runs), ""]
    lines += [f"- falls short: {markdown(item['promise'])}; measured {item['measured']}" for item in missed]
    lines += [""] if missed else []
    header = ["stage", "metric", "mean", "standard deviation", *(markdown(run.name) for run in runs)]
    for title, entries, shown in (
        ("Every metric on every stage", stages, number),
        ("What each stage gained, and what it cost", changes, signed),
    ):
        rows = []
        for stage, metrics in entries.items():
            for metric, figures in metrics.items():
                digits = metric_info(metric).digits
                values = ["–" if x is None else shown(x, digits) for x in figures["values"]]
                mean, sd = shown(figures["mean"], digits), number(figures["sd"], digits)
                rows.append([f"`{stage}`", markdown(metric_info(metric).label), mean, sd, *values])
        if rows:
            lines += [f"## {title}", "", *table(header, rows)]
    rows = [[f"`{name}`", duration(x["mean"]), duration(x["sd"])] for name, x in times.items()]
    if rows:
        lines += ["## Time", "", *table(["step", "mean", "standard deviation"], rows)]
    return "\n".join(lines).rstrip() + "\n"
