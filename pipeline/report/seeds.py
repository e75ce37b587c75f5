"""The report over several runs of one recipe, usually under several seeds: mean, spread and interval."""

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
from pipeline.report.load import Run, stage_info, stage_order, step_order
from pipeline.report.page import draw, write_files
from pipeline.report.summary import summarise
from pipeline.report.targets import Target
from pipeline.report.text import counted, duration, number, signed
from pipeline.report.verdict import Finding

Spread = dict[str, Any]
"""`mean`, `sd` (n - 1; None for one run), `ci95`, `min`, `max`, `n` (runs) and `values` (None where a run lacks it)."""
Spreads = dict[str, dict[str, Any]]
"""The spread of each figure, by stage (or another group) and name."""


def find_seeds(path: Path) -> list[Path]:
    """Return the runs that `run --seeds` made in a folder, ordered by seed; the folder, if it is a run itself."""
    if (path / "run.json").exists() or (path / "evaluations").exists():
        return [path]
    seeds = [(int(match[1]), run) for run in path.glob("seed*") if (match := re.fullmatch(r"seed(\d+)", run.name))]
    return [run for _, run in sorted(seeds)] or [path]


def spread(runs: Sequence[Estimate | None], *bounds: float) -> Spread:
    """Return the spread of a figure over the runs that have it, with the `bounds` of `over_seeds`."""
    found = [run for run in runs if run is not None]
    values = [run.value for run in found]
    mean = over_seeds(found, *bounds)
    of_mean = {"mean": mean.value, "sd": stdev(values) if len(values) > 1 else None, "ci95": mean.to_json()["ci95"]}
    each = [run and run.value for run in runs]
    return of_mean | {"min": min(values), "max": max(values), "n": len(values), "values": each}


def write_seeds(
    runs: Sequence[Run], found: Sequence[Sequence[Difference]], targets: Sequence[Target], directory: Path
) -> Path:
    """Write index.html, metrics.json and report.md over runs with the differences `found`. Return the page's path."""
    each = [summarise(run, of_run, targets) for run, of_run in zip(runs, found, strict=True)]
    stages, baselines = (_spreads([of_run[key] for of_run in each]) for key in ("stages", "baselines"))
    # The differences of a run by stage, or by `<stage> - <baseline or variant>`, and then by metric.
    by_stage: list[dict[str, dict[str, Any]]] = [defaultdict(dict) for _ in runs]
    for run, groups, of_run in zip(runs, by_stage, each, strict=True):
        for item in of_run["differences"]:
            origin = run.origin(run.stages[item["stage"]])
            other = "" if origin and item["before"] == origin.name else f" - {item['before']}"
            groups[f"{item['stage']}{other}"][item["metric"]] = item
    changes = _spreads(by_stage, lowest=-1.0)
    # The seconds of each step and, in the last row, of all steps together.
    taken = [of_run["seconds"] for of_run in each]
    taken = [of_run | {"together": sum(of_run.values())} if of_run else {} for of_run in taken]
    steps = sorted({step for of_run in taken for step in of_run}, key=step_order)
    times = {step: spread([Estimate(one[step]) if step in one else None for one in taken], 0.0) for step in steps}
    seeds = {run.name: run.record.get("seed") for run in runs}
    labels = {name: name if seed is None else f"{name} (seed {seed})" for name, seed in seeds.items()}
    summary: dict[str, Any] = {
        "runs": [{"run": run.name, "seed": seeds[run.name], "commit": run.commit} for run in runs],
        "stages": stages,
        "baselines": baselines,
        "differences": changes,
        "seconds": {step: item for step, item in times.items() if step != "together"},
    }
    for kind in ("promises", "alarms", "verdict"):
        summary[kind] = [{"run": of_run["run"], **item} for of_run in each for item in of_run[kind]]
    summary["not_judged"] = [{"run": of_run["run"], "line": line} for of_run in each for line in of_run["not_judged"]]
    summary["notes"] = [note for run in runs for note in run.notes]
    # Different texts may have won in each run.
    titles = {}
    for group in baselines:
        found_titles = (run.baseline_title(run.baselines[group]) for run in runs if group in run.baselines)
        titles[group] = " / ".join(dict.fromkeys(found_titles))
    how = "The intervals are over the test rows of the only run. The variation between trainings is unknown."
    if len(runs) > 1:
        how = "Each run counts once. The 95% interval is Student's over the runs, and never narrower than the widest "
        how += "of the runs' own intervals over test rows. The standard deviation is between runs (n − 1)."
    content = {
        "name": counted(len(runs), "run"),
        "headline": f"{counted(len(runs), 'run')}: mean and spread",
        "how": how,
        "facts": [labels[run.name] for run in runs],
        "names": [run.name for run in runs],
        "targets": [one | {"promise": f"{labels[one['run']]}: {one['promise']}"} for one in summary["promises"]],
        "conclusion": "",
        "verdict": [f"{labels[of_run['run']]}, {Finding(**item)}" for of_run in each for item in of_run["verdict"]],
        "unjudged": [f"{labels[of_run['run']]}, {line}" for of_run in each for line in of_run["not_judged"]],
        "notes": summary["notes"],
        "figures": _groups(runs, stages) + _groups(runs, baselines, titles),
        "changes": _groups(runs, changes, sign=True),
        "charts": draw(overlay(runs)),
        "times": [{"title": "All steps", "stage": "", "rows": [_row(*item, duration) for item in times.items()]}],
        "paths": [os.path.relpath(run.path / "report" / "index.html", directory) for run in runs],
    }
    return write_files(directory, "seeds", summary, content)


def _spreads(runs: Sequence[Mapping[str, Mapping[str, Any]]], lowest: float = 0.0) -> Spreads:
    """Return the spread of each figure; `lowest` is the smallest value of a share."""
    result: Spreads = {}
    for group in sorted({group for run in runs for group in run}, key=stage_order):
        figures = [run.get(group, {}) for run in runs]
        result[group] = {}
        for name in sorted({name for of_run in figures for name in of_run}, key=metric_order):
            values = [of_run.get(name) for of_run in figures]
            # The texts of baselines are listed, because texts have no mean.
            if any(isinstance(value, str) for value in values):
                result[group][name] = values
            elif name == "pass@1_by_length":
                rows = [value or {} for value in values]
                result[group][name] = {
                    length: spread([row.get(length) and Estimate.from_json(row[length]) for row in rows], 0.0, 1.0)
                    for length in dict.fromkeys(length for row in rows for length in row)
                }
            else:
                bounds = (lowest, 1.0) if metric_info(name).share else ()
                result[group][name] = spread([value and Estimate.from_json(value) for value in values], *bounds)
    return result


def _groups(
    runs: Sequence[Run], stages: Spreads, titles: Mapping[str, str] | None = None, sign: bool = False
) -> list[dict[str, Any]]:
    """Return the rows of each stage, or of each baseline with its title; figures are signed if `sign`."""
    known = {stage.name: stage for run in runs for stage in run.stages.values()}
    groups = []
    for group, metrics in stages.items():
        # "4_grpo - elicited" is a difference of the stage from a baseline.
        name, rows = group.partition(" - ")[0], []
        info = stage_info(known.get(name, name))
        for metric, figures in metrics.items():
            if "mean" in figures:
                shown = metric_info(metric)
                row = _row(shown.label, figures, partial(signed if sign else number, digits=shown.digits))
                rows.append({**row, "sd": number(figures["sd"], shown.digits), "aim": metric in info.aims})
        groups.append({"title": (titles or {}).get(group) or info.title, "stage": group, "rows": rows})
    return groups


def _row(name: str, figures: Spread, show: Callable[..., str]) -> dict[str, Any]:
    values, ends = (list(map(show, figures[key] or ())) for key in ("values", "ci95"))
    shown = {"mean": show(figures["mean"]), "sd": show(figures["sd"]), "range": " to ".join(ends), "values": values}
    return {"label": name, "aim": False, **shown}
