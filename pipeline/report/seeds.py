"""The report over several runs of one recipe, usually under several seeds: mean, spread and interval."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from pipeline.evaluation.intervals import Estimate, over_seeds
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.curves import overlay
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.page import draw, write_files
from pipeline.report.stage_order import stage_info, stage_order, step_order
from pipeline.report.summary import summarise
from pipeline.report.tables import baseline_title, show_targets
from pipeline.report.targets import Target, check_targets
from pipeline.report.text import counted, duration, number, signed
from pipeline.report.verdict import Finding

SEVERAL = (
    "Each run counts once. The 95% interval is Student's over the runs, and never narrower than the widest of the "
    "runs' own intervals over test rows. The standard deviation is between runs (n − 1)."
)
ONE = "The intervals are over the test rows of the only run. How much training varies is not known."
"""How to read the figures of several runs, and of one."""

Spread = dict[str, Any]
"""`mean`, `sd` (n - 1; None for one run), `ci95`, `min`, `max`, `n` (runs) and `values` (None where a run lacks it)."""


def find_seeds(path: Path) -> list[Path]:
    """Return the runs that `run --seeds` made in a folder, ordered by seed; the folder, if it is a run itself."""
    if (path / "run.json").exists() or (path / "evaluations").exists():
        return [path]
    seeds = [(int(match[1]), run) for run in path.glob("seed*") if (match := re.fullmatch(r"seed(\d+)", run.name))]
    return [run for _, run in sorted(seeds)] or [path]


def spread(runs: Sequence[Estimate | None], *bounds: float) -> Spread:
    """Return the spread of a figure over the runs that have it, at least one.

    Args:
        runs: The figure of each run, None for a run that lacks it.
        bounds: The smallest and the largest value that the figure can have, as for `over_seeds`.
    """
    found = [run for run in runs if run is not None]
    values = [run.value for run in found]
    mean = over_seeds(found, *bounds)
    return {
        "mean": mean.value,
        "sd": stdev(values) if len(values) > 1 else None,
        "ci95": mean.to_json()["ci95"],
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": [None if run is None else run.value for run in runs],
    }


def write_seeds(
    runs: Sequence[Run], found: Sequence[Sequence[Difference]], targets: Sequence[Target], directory: Path
) -> Path:
    """Write index.html, metrics.json and report.md over several runs. Return the path of the first.

    Args:
        runs: At least one run.
        found: The paired differences of each.
        targets: The targets of each run.
        directory: Where to write.
    """
    results = [check_targets(run, of_run, targets) for run, of_run in zip(runs, found, strict=True)]
    each = [summarise(*of_run) for of_run in zip(runs, found, results, strict=True)]
    stages = _spreads([of_run["stages"] for of_run in each])
    baselines = _spreads([of_run["baselines"] for of_run in each])
    # The differences of a run by stage, or by `<stage> - <baseline>`, and then by metric.
    by_stage: list[dict[str, dict[str, Any]]] = [defaultdict(dict) for _ in runs]
    for groups, of_run in zip(by_stage, each, strict=True):
        for item in of_run["differences"]:
            is_baseline = item["before"] in of_run["baselines"]
            group = f"{item['stage']} - {item['before']}" if is_baseline else item["stage"]
            groups[group][item["metric"]] = item
    changes = _spreads(by_stage, lowest=-1.0)
    # The seconds of each step, and in the last row of all steps together.
    taken = [of_run["seconds"] for of_run in each]
    taken = [of_run | {"together": sum(of_run.values())} if of_run else {} for of_run in taken]
    steps = sorted({step for of_run in taken for step in of_run}, key=step_order)
    times = {
        step: spread([Estimate(of_run[step]) if step in of_run else None for of_run in taken], 0.0) for step in steps
    }
    summary = {
        "runs": [{"run": run.name, "seed": run.record.get("seed"), "commit": run.commit} for run in runs],
        "stages": stages,
        "baselines": baselines,
        "differences": changes,
        "seconds": {step: item for step, item in times.items() if step != "together"},
        **{
            kind: [{"run": run.name, **item} for run, of_run in zip(runs, each, strict=True) for item in of_run[kind]]
            for kind in ("promises", "alarms", "verdict")
        },
        "notes": [note for run in runs for note in run.notes],
    }
    # The runs may have found different texts that win by themselves.
    titles = {
        group: " / ".join(
            dict.fromkeys(baseline_title(run, run.baselines[group]) for run in runs if group in run.baselines)
        )
        for group in baselines
    }
    rows = [_row(step, item, duration) for step, item in times.items()]
    name = counted(len(runs), "run")
    content = {
        "name": name,
        "headline": f"{name}: mean and spread",
        "how": SEVERAL if len(runs) > 1 else ONE,
        "facts": [label(run) for run in runs],
        "names": [run.name for run in runs],
        "targets": [
            shown
            for run, of_run in zip(runs, results, strict=True)
            for shown in show_targets(of_run, prefix=f"{label(run)}: ")
        ],
        "conclusion": "",
        "verdict": [
            f"{label(run)}, {Finding(**item)}" for run, of in zip(runs, each, strict=True) for item in of["verdict"]
        ],
        "notes": summary["notes"],
        "figures": _groups(stages) + _groups(baselines, titles),
        "changes": _groups(changes, sign=True),
        "charts": draw(overlay(runs)),
        "times": [{"title": "All steps", "stage": "", "rows": rows}],
        "paths": [os.path.relpath(run.path / "report" / "index.html", directory) for run in runs],
    }
    return write_files(directory, "seeds", summary, content)


def label(run: Run) -> str:
    """Return the run's name and seed."""
    seed = run.record.get("seed")
    return run.name if seed is None else f"{run.name} (seed {seed})"


def _spreads(runs: Sequence[Mapping[str, Mapping[str, Any]]], lowest: float = 0.0) -> dict[str, dict[str, Any]]:
    """Return the spread of each figure of metrics.json, as group -> name -> spread. Texts are listed.

    Args:
        runs: The figures of each run, as group -> name -> estimate or text.
        lowest: The smallest value that the figure of a share can have.
    """
    result: dict[str, dict[str, Any]] = {}
    for group in sorted({group for run in runs for group in run}, key=stage_order):
        figures = [run.get(group, {}) for run in runs]
        result[group] = {}
        for name in sorted({name for of_run in figures for name in of_run}, key=metric_order):
            values = [of_run.get(name) for of_run in figures]
            # The texts of baselines are listed, because there is no mean of them.
            if any(isinstance(value, str) for value in values):
                result[group][name] = values
            elif name == "pass@1_by_length":
                rows = [value or {} for value in values]
                result[group][name] = {
                    length: spread([row.get(length) and Estimate.from_json(row[length]) for row in rows], 0.0, 1.0)
                    for length in {length: None for row in rows for length in row}
                }
            else:
                bounds = (lowest, 1.0) if metric_info(name).share else ()
                result[group][name] = spread([value and Estimate.from_json(value) for value in values], *bounds)
    return result


def _groups(
    stages: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str] | None = None, sign: bool = False
) -> list[dict[str, Any]]:
    """Return the rows of each stage, or of each baseline with its title; figures are signed if `sign`."""
    groups = []
    for group, metrics in stages.items():
        # "4_grpo - elicited" is a difference of the stage from a baseline.
        stage, rows = group.partition(" - ")[0], []
        for metric, figures in metrics.items():
            if "mean" in figures:
                info = metric_info(metric)
                show = partial(signed if sign else number, digits=info.digits)
                row = _row(info.label, figures, show) | {"sd": number(figures["sd"], info.digits)}
                rows.append({**row, "aim": metric in stage_info(stage).aims})
        groups.append({"title": (titles or {}).get(group) or stage_info(stage).title, "stage": group, "rows": rows})
    return groups


def _row(name: str, figures: Spread, show: Callable[..., str]) -> dict[str, Any]:
    return {
        "label": name,
        "aim": False,
        "mean": show(figures["mean"]),
        "range": " to ".join(map(show, figures["ci95"] or ())),
        "sd": show(figures["sd"]),
        "values": list(map(show, figures["values"])),
    }
