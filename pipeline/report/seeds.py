"""The report over several runs of one recipe, usually under several seeds: mean and spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.curves import overlay
from pipeline.report.differences import Difference
from pipeline.report.labels import stage_info, stage_order, step_order
from pipeline.report.load import Run
from pipeline.report.page import draw, write_files
from pipeline.report.summary import seconds
from pipeline.report.tables import show_targets
from pipeline.report.targets import Target, check_targets
from pipeline.report.text import duration, number, signed

Spread = dict[str, Any]
"""`mean`, `sd`, `min`, `max`, `n` and `values`, the last with None for a run that lacks the figure."""


def spread(runs: Sequence[Mapping[Any, float]], order: Callable[[Any], Any]) -> dict[Any, Spread]:
    """Return the spread of each figure over the runs that have it, by name; `sd` (n - 1) is None for a single run."""
    import pandas  # type: ignore[import-untyped]  # takes a third of a second

    names = sorted({name for figures in runs for name in figures}, key=order)
    if not names:
        return {}
    frame = pandas.DataFrame([[figures.get(name) for figures in runs] for name in names], dtype=float)
    found = frame.agg(["mean", "std", "min", "max", "count"], axis=1).to_dict("records")
    return {
        name: {
            "mean": row["mean"],
            "sd": row["std"] if row["count"] > 1 else None,
            "min": row["min"],
            "max": row["max"],
            "n": int(row["count"]),
            "values": [figures.get(name) for figures in runs],
        }
        for name, row in zip(names, found, strict=True)
    }


def write_seeds(
    runs: Sequence[Run], found: Sequence[Sequence[Difference]], targets: Sequence[Target], directory: Path
) -> Path:
    """Write index.html, metrics.json and report.md over several runs. Return the path of the first.

    Args:
        runs: At least two runs.
        found: The paired differences of each.
        targets: The targets of each run.
        directory: Where to write.
    """
    stages = _by_stage(
        [{(name, m): x.value for name, stage in run.stages.items() for m, x in stage.metrics.items()} for run in runs]
    )
    changes = _by_stage([{(item.stage, item.metric): item.change.value for item in of_run} for of_run in found])
    taken = [seconds(run) for run in runs]
    times = spread(taken, step_order)
    results = [check_targets(run, of_run, targets) for run, of_run in zip(runs, found, strict=True)]
    summary = {
        "runs": [{"run": run.name, "seed": run.record.get("seed"), "commit": run.commit} for run in runs],
        "stages": stages,
        "differences": changes,
        "seconds": times,
        "promises": [
            {"run": run.name, "promise": str(item.target), "measured": item.measured, "kept": item.met}
            for run, of_run in zip(runs, results, strict=True)
            for item in of_run
        ],
        "notes": [note for run in runs for note in run.notes],
    }
    together = spread([{"together": sum(run.values())} if run else {} for run in taken], str)
    rows = [_row(name, item, duration, duration) for name, item in {**times, **together}.items()]
    content = {
        "name": f"{len(runs)} runs",
        "headline": f"{len(runs)} runs: mean and spread",
        "facts": [label(run) for run in runs],
        "names": [run.name for run in runs],
        "targets": [
            shown
            for run, of_run in zip(runs, results, strict=True)
            for shown in show_targets(of_run, prefix=f"{label(run)}: ")
        ],
        "notes": summary["notes"],
        "figures": _groups(stages, number),
        "changes": _groups(changes, signed),
        "charts": draw(overlay(runs)),
        "times": [{"title": "All steps", "stage": "", "rows": rows}],
        "paths": [str(run.path / "report" / "index.html") for run in runs],
    }
    return write_files(directory, "seeds", summary, content)


def label(run: Run) -> str:
    """Return the run's name and seed."""
    seed = run.record.get("seed")
    return run.name if seed is None else f"{run.name} (seed {seed})"


def _by_stage(runs: Sequence[Mapping[tuple[str, str], float]]) -> dict[str, dict[str, Spread]]:
    """Return the spread of figures named (stage, metric), as stage -> metric -> spread."""
    result: dict[str, dict[str, Spread]] = {}
    spreads = spread(runs, lambda name: (stage_order(name[0]), metric_order(name[1])))
    for (stage, metric), figures in spreads.items():
        result.setdefault(stage, {})[metric] = figures
    return result


def _groups(stages: Mapping[str, Mapping[str, Spread]], show: Callable[..., str]) -> list[dict[str, Any]]:
    """Return the rows of each stage, with figures as text by `show`."""
    groups = []
    for stage, metrics in stages.items():
        rows = []
        for metric, figures in metrics.items():
            info = metric_info(metric)
            row = _row(info.label, figures, partial(show, digits=info.digits), partial(number, digits=info.digits))
            rows.append({**row, "aim": metric in stage_info(stage).aims})
        groups.append({"title": stage_info(stage).title, "stage": stage, "rows": rows})
    return groups


def _row(name: str, figures: Spread, show: Callable[..., str], show_sd: Callable[..., str]) -> dict[str, Any]:
    return {
        "label": name,
        "aim": False,
        "mean": show(figures["mean"]),
        "sd": show_sd(figures["sd"]),
        "lowest": show(figures["min"]),
        "highest": show(figures["max"]),
        "values": [show(value) for value in figures["values"]],
    }
