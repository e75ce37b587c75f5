"""The report over several runs of one recipe, usually under several seeds: mean, spread and interval.

`summarise` returns the metrics.json of each run. Here, the same entry of all runs becomes one `Spread`, which goes into
the metrics.json of the report (`_spreads`) and, as text, into the tables of its page (`_groups`).
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

from pipeline.evaluation.intervals import Estimate, over_seeds
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.curves import overlay
from pipeline.report.differences import Difference
from pipeline.report.load import Run, stage_info, step_order
from pipeline.report.page import draw, write_files
from pipeline.report.summary import summarise
from pipeline.report.targets import Target
from pipeline.report.text import counted, duration, number, signed
from pipeline.report.verdict import Finding
from pipeline.stages import stage_order

Spread = dict[str, Any]
"""`mean`, `sd` (n - 1; None for one run), `ci95`, `min`, `max`, `n` (runs) and `values` (None where a run lacks it)."""
Spreads = dict[str, dict[str, Any]]
"""The spread of each metric, by stage (or another group) and name."""


def find_seeds(path: Path) -> list[Path]:
    """Return the runs that `run --seeds` made in a folder (seed0, seed1, …), ordered by seed.

    If the folder is a run itself, or contains no such runs, return the folder.
    """
    if (path / "run.json").exists() or (path / "evaluations").exists():
        return [path]
    runs = []
    for run in path.glob("seed*"):
        match = re.fullmatch(r"seed(\d+)", run.name)
        if match:
            runs.append((int(match[1]), run))
    return [run for _, run in sorted(runs)] or [path]


def spread(estimates: Sequence[Estimate | None], *bounds: float) -> Spread:
    """Return the spread of a metric over the runs that have it.

    Args:
        estimates: The metric in each run, None if a run lacks it; at least one has it.
        *bounds: The lowest and the highest value of the metric, if it has such bounds; its interval stays within them.
    """
    present = [estimate for estimate in estimates if estimate is not None]
    values = [estimate.value for estimate in present]
    mean = over_seeds(present, *bounds)
    return {
        "mean": mean.value,
        "sd": stdev(values) if len(values) > 1 else None,
        "ci95": mean.to_json()["ci95"],
        "min": min(values),
        "max": max(values),
        "n": len(values),
        "values": [None if estimate is None else estimate.value for estimate in estimates],
    }


def write_seeds(
    runs: Sequence[Run], changes: Sequence[Sequence[Difference]], targets: Sequence[Target], directory: Path
) -> Path:
    """Write index.html, metrics.json and report.md over several runs. Return the path of index.html.

    Args:
        runs: The runs.
        changes: The differences of each run.
        targets: What the recipe promises.
        directory: Where to write.
    """
    summaries = [summarise(run, run_changes, targets) for run, run_changes in zip(runs, changes, strict=True)]
    stages = _spreads([summary["stages"] for summary in summaries])
    baselines = _spreads([summary["baselines"] for summary in summaries])
    changes_by_stage = [_changes_by_stage(run, summary) for run, summary in zip(runs, summaries, strict=True)]
    differences = _spreads(changes_by_stage, lowest=-1.0)
    times = _times([summary["seconds"] for summary in summaries])
    seeds = {run.name: run.record.get("seed") for run in runs}
    summary: dict[str, Any] = {
        "runs": [{"run": run.name, "seed": seeds[run.name], "commit": run.commit} for run in runs],
        "stages": stages,
        "baselines": baselines,
        "differences": differences,
        "seconds": {step: item for step, item in times.items() if step != "together"},
    }
    # These are lists in the report of a run. Here, they are concatenated, and each entry names its run.
    for key in ("promises", "alarms", "verdict"):
        summary[key] = []
        for run_summary in summaries:
            summary[key] += [{"run": run_summary["run"], **item} for item in run_summary[key]]
    summary["not_judged"] = []
    for run_summary in summaries:
        summary["not_judged"] += [{"run": run_summary["run"], "line": line} for line in run_summary["not_judged"]]
    summary["notes"] = [note for run in runs for note in run.notes]
    content = {
        **_text(summaries, seeds),
        "names": [run.name for run in runs],
        "conclusion": "",
        "notes": summary["notes"],
        "figures": _groups(runs, stages) + _groups(runs, baselines, _baseline_titles(runs, baselines)),
        "changes": _groups(runs, differences, sign=True),
        "charts": draw(overlay(runs)),
        "times": [{"title": "All steps", "stage": "", "rows": [_row(*item, duration) for item in times.items()]}],
        "paths": [os.path.relpath(run.path / "report" / "index.html", directory) for run in runs],
    }
    return write_files(directory, "seeds", summary, content)


def _text(summaries: Sequence[Mapping[str, Any]], seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts of the report: its headline, how intervals were computed, and targets and verdict of each run.

    Args:
        summaries: The metrics.json of each run.
        seeds: Name of a run -> its seed, None if unknown.
    """
    labels = {name: name if seed is None else f"{name} (seed {seed})" for name, seed in seeds.items()}
    how = "The intervals are over the test rows of the only run. The variation between trainings is unknown."
    if len(summaries) > 1:
        how = (
            "Each run counts once. The 95% interval is Student's over the runs, and never narrower than the widest of "
            "the runs' own intervals over test rows. The standard deviation is between runs (n − 1)."
        )
    targets = []
    verdict = []
    unjudged = []
    for summary in summaries:
        label = labels[summary["run"]]
        targets += [
            {"run": summary["run"], **item, "promise": f"{label}: {item['promise']}"} for item in summary["promises"]
        ]
        verdict += [f"{label}, {Finding(**item)}" for item in summary["verdict"]]
        unjudged += [f"{label}, {line}" for line in summary["not_judged"]]
    return {
        "name": counted(len(summaries), "run"),
        "headline": f"{counted(len(summaries), 'run')}: mean and spread",
        "how": how,
        "facts": list(labels.values()),
        "targets": targets,
        "verdict": verdict,
        "unjudged": unjudged,
    }


def _changes_by_stage(run: Run, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the differences of a run by stage and then by metric.

    Differences from anything but the stage that a stage started from are under "<stage> - <baseline or variant>".
    """
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for item in summary["differences"]:
        parent = run.parent_stage(run.stages[item["stage"]])
        group = item["stage"]
        if parent is None or item["before"] != parent.name:
            group += f" - {item['before']}"
        groups[group][item["metric"]] = item
    return groups


def _times(seconds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Return the spread of the seconds of each step and, last, of all steps `together`.

    `seconds` are the seconds of each step, for each run; {} for a run without times.
    """
    rows = []
    for run_seconds in seconds:
        row = dict(run_seconds)
        if row:
            row["together"] = sum(row.values())
        rows.append(row)
    times = {}
    for step in sorted({step for row in rows for step in row}, key=step_order):
        estimates = [Estimate(row[step]) if step in row else None for row in rows]
        times[step] = spread(estimates, 0.0)
    return times


def _baseline_titles(runs: Sequence[Run], baselines: Iterable[str]) -> dict[str, str]:
    """Return the title of each baseline.

    The title of an elicited baseline contains the prompt that worked best, which may differ between runs. All titles of
    a baseline are joined with " / ".
    """
    titles = {}
    for name in baselines:
        run_titles = dict.fromkeys(run.baseline_title(run.baselines[name]) for run in runs if name in run.baselines)
        titles[name] = " / ".join(run_titles)
    return titles


def _spreads(runs: Sequence[Mapping[str, Mapping[str, Any]]], lowest: float = 0.0) -> Spreads:
    """Return the spread of each metric, by stage (or another group) and name.

    Args:
        runs: The JSON of the estimates of each run, by group and metric.
        lowest: The smallest value of a share, -1 for differences.
    """
    spreads: Spreads = {}
    for group in sorted({group for run in runs for group in run}, key=stage_order):
        entries = [run.get(group, {}) for run in runs]
        spreads[group] = {}
        for name in sorted({name for entry in entries for name in entry}, key=metric_order):
            values = [entry.get(name) for entry in entries]
            # The texts of baselines are listed, because texts have no mean.
            if any(isinstance(value, str) for value in values):
                spreads[group][name] = values
            elif name == "pass@1_by_length":
                spreads[group][name] = _spreads_by_length([value or {} for value in values])
            else:
                estimates = [None if value is None else Estimate.from_json(value) for value in values]
                if metric_info(name).share:
                    spreads[group][name] = spread(estimates, lowest, 1.0)
                else:
                    spreads[group][name] = spread(estimates)
    return spreads


def _spreads_by_length(rows: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """Return the spread of pass@1 for each length of a problem; `rows` are the JSON of the estimates of each run."""
    spreads = {}
    for length in dict.fromkeys(length for row in rows for length in row):
        estimates = [Estimate.from_json(row[length]) if length in row else None for row in rows]
        spreads[length] = spread(estimates, 0.0, 1.0)
    return spreads


def _groups(
    runs: Sequence[Run], stages: Spreads, titles: Mapping[str, str] | None = None, sign: bool = False
) -> list[dict[str, Any]]:
    """Return the tables of the report's page, one for each stage, baseline or difference, with a row for each metric.

    Args:
        runs: The runs.
        stages: The spreads to show.
        titles: Titles of tables by group, by default the name of the stage's kind.
        sign: Whether to write means and values with their sign, as is usual for differences.
    """
    results = {stage.name: stage for run in runs for stage in run.stages.values()}
    aims = {stage.name: run.aims_of(stage) for run in runs for stage in run.stages.values()}
    groups = []
    for group, metrics in stages.items():
        # "4_grpo - elicited" is a difference of the stage from a baseline.
        name = group.partition(" - ")[0]
        info = stage_info(results.get(name, name))
        rows = []
        for metric, entry in metrics.items():
            # Texts of baselines, and pass@1 by length, have no row.
            if "mean" in entry:
                described = metric_info(metric)
                row = _row(described.label, entry, partial(signed if sign else number, digits=described.digits))
                is_aim = metric in aims.get(name, ())
                rows.append({**row, "sd": number(entry["sd"], described.digits), "aim": is_aim})
        groups.append({"title": (titles or {}).get(group) or info.title, "stage": group, "rows": rows})
    return groups


def _row(label: str, entry: Spread, show: Callable[..., str]) -> dict[str, Any]:
    """Return a row of a table: mean, standard deviation, interval ("" if none) and values of a spread, as text.

    `show` formats a number, or None.
    """
    return {
        "label": label,
        "aim": False,
        "mean": show(entry["mean"]),
        "sd": show(entry["sd"]),
        "range": " to ".join(map(show, entry["ci95"] or ())),
        "values": list(map(show, entry["values"])),
    }
