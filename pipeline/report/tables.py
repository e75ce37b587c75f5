"""The tables of the report, as the templates fill them in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.evaluation.results import StageResult
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.stage_order import EVALUATE, stage_info, step_order
from pipeline.report.summary import by_length, seconds
from pipeline.report.svg import interval_bar, share_bar
from pipeline.report.targets import TargetResult
from pipeline.report.text import duration, interval, magnitude, number, signed, size
from pipeline.report.verdict import lost_rows
from pipeline.stages import BASELINES


def show_targets(results: Sequence[TargetResult], prefix: str = "") -> list[dict[str, Any]]:
    """Return targets as text, each with `prefix` before it."""
    return [
        {"target": f"{prefix}{item.target}", "measured": number(item.measured), "met": item.met} for item in results
    ]


def figures(run: Run, by_kind: bool) -> dict[str, Any]:
    """Return one row per metric (or per metric and kind of example), with a cell per stage."""
    stages = [stage for stage in run.stages.values() if stage.metrics]
    baselines = [baseline for baseline in run.baselines.values() if baseline.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        info = metric_info(metric)
        whole = [stage.metrics.get(metric) for stage in stages]
        kinds = sorted({kind for item in whole if item for kind in item.by_kind}) if by_kind else [""]
        for kind in kinds:
            estimates = [item.by_kind.get(kind) if item and kind else item for item in whole]
            counts = sorted({item.n for item in estimates if item is not None and item.n is not None})
            meaning = []
            if info.meaning and not kind:
                meaning.append(info.meaning.replace("{against}", run.against).replace("{judge}", run.judge))
            if counts:
                meaning.append(f"n\u00a0=\u00a0{' or '.join(f'{count:,}' for count in counts)}")
            rows.append(
                {
                    "label": f"{info.label}: {kind}" if kind else info.label,
                    "meaning": "; ".join(meaning),
                    "arrow": {"up": "↑", "down": "↓", "": ""}[info.better],
                    "direction": {"up": "higher is better", "down": "lower is better", "": ""}[info.better],
                    "cells": [
                        estimate and _cell(estimate, metric, metric in stage_info(stage.name).aims)
                        for stage, estimate in zip(stages, estimates, strict=True)
                    ],
                }
            )
    columns = [{"name": stage.name, "title": stage_info(stage.name).title} for stage in stages]
    legend = [
        {
            "name": item.name,
            "title": baseline_title(run, item),
            "figures": [
                {"label": metric_info(name).label, **_cell(estimate, name)} for name, estimate in item.metrics.items()
            ],
        }
        for item in baselines
    ]
    return {"columns": columns, "baselines": legend, "rows": rows}


def baseline_title(run: Run, baseline: StageResult) -> str:
    """Return what a baseline is called, with the text or texts that its answers share."""
    # A text may be nothing but a line break.
    texts = dict.fromkeys(str(text).replace("\n", "⏎") for text in baseline.texts.get(baseline.name, {}).values())
    title = BASELINES[baseline.name].title if baseline.name in BASELINES else baseline.name
    title = title.replace("{against}", run.against)
    return f"{title} {' or '.join(f'“{text}”' for text in texts)}".strip()


def _cell(estimate: Estimate, metric: str, aim: bool = False) -> dict[str, Any]:
    info = metric_info(metric)
    bar = share_bar(estimate.value, estimate.low, estimate.high) if info.share else ""
    return {
        "value": number(estimate.value, info.digits),
        "range": interval(estimate, info.digits),
        "bar": bar,
        "aim": aim,
    }


def remarks(run: Run) -> list[str]:
    """Return what is to be said about how the stages were measured: what was left out, cut off or trained on."""
    measured = [stage for stage in run.stages.values() if stage.metrics]
    lines: dict[str, list[str]] = {}
    for stage in measured:
        for line in stage.remarks():
            lines.setdefault(line, []).append(stage.name)
    for step, entry in run.steps.items():
        for lost in lost_rows(entry):
            lines[f"{step}: {lost['rows']:,} of {lost['of']:,} {lost['what']}"] = [""] * len(run.stages)
    # What is said of every stage that writes text does not name them.
    of_all = len([stage for stage in measured if stage_info(stage.name).generates])
    return [line if len(names) >= of_all else f"{line} ({', '.join(names)})" for line, names in lines.items()]


def lengths(run: Run) -> dict[str, Any]:
    """Return the pass@1 of the last two stages by the length of the problem, and of those longer than in training."""
    measured = [(name, of_stage) for name, stage in run.stages.items() if (of_stage := by_length(stage))]
    found = dict(measured[-2:])
    columns = sorted({length for of_stage in found.values() for length in of_stage}, key=int)
    longer = {name: run.stages[name].metrics.get("pass@1_longer") for name in found}
    rows = []
    for name, of_stage in found.items():
        estimates = [*map(of_stage.get, columns), *([longer[name]] if any(longer.values()) else [])]
        rows.append({"stage": name, "cells": [estimate and _cell(estimate, "pass@1") for estimate in estimates]})
    return {"columns": [*columns, *(["longer"] if any(longer.values()) else [])], "rows": rows}


def others(run: Run) -> list[dict[str, Any]]:
    """Return the figures of the evaluations with a name."""
    rows = []
    for name, stages in run.others.items():
        for stage, metrics in stages.items():
            for metric in sorted(metrics, key=metric_order):
                estimate = metrics[metric]
                row = {"name": name, "stage": stage, "label": metric_info(metric).label, "n": f"{estimate.n or 0:,}"}
                rows.append(row | _cell(estimate, metric))
    return rows


def gains(run: Run, found: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return the paired differences grouped by their two stages: of shares with a bar, of lengths with their ratio."""
    groups = []
    for (stage, before), changes in groupby(found, key=lambda item: (item.stage, item.before)):
        rows = []
        for item in changes:
            info = metric_info(item.metric)
            title = f"Change of {info.label} from {before} to {stage}"
            ratio = "" if info.share or item.was <= 0 or item.now < 0 else f"×{number(item.now / item.was, 2)}"
            rows.append(
                {
                    "label": info.label,
                    "aim": item.aim,
                    "main": item.aim or item.verdict == "worse",
                    "was": number(item.was, info.digits),
                    "now": number(item.now, info.digits),
                    "change": signed(item.change.value, info.digits),
                    "range": interval(item.change, info.digits, sign=True),
                    "bar": interval_bar(item.change, title) if info.share else ratio,
                    "verdict": item.verdict,
                    "n": f"{item.change.n:,}" if item.change.n is not None else "–",
                }
            )
        groups.append(
            {
                "stage": stage,
                "before": before,
                "title": stage_info(stage).title,
                "baseline": baseline_title(run, run.baselines[before]) if before in run.baselines else "",
                "rows": rows,
            }
        )
    return groups


def experts(run: Run) -> dict[str, Any]:
    """Return the load of each expert in every stage, and the tokens that it took of some texts in pretraining."""
    loads = {
        name: stage.experts.get("layers", []) for name, stage in run.stages.items() if "expert_load" in stage.metrics
    }
    # The texts are read by pretraining, where experts specialise.
    shown = next((name for name in loads if stage_info(name).from_scratch), "")
    documents = run.stages[shown].experts.get("documents", []) if shown else []
    rows: list[dict[str, Any]] = []
    drawn: list[list[dict[str, Any]]] = []
    try:
        for name, layers in loads.items():
            for layer, shares in enumerate(layers, 1):
                rows.append({"stage": name, "layer": str(layer), "shares": [number(float(x), 2) for x in shares]})
        for item in documents:
            panels = []
            for layer, chosen in enumerate(item["chosen"], 1):
                # Neighbouring tokens that went to the same expert are shown as one piece of text.
                runs = groupby(zip(chosen, item["pieces"], strict=True), key=lambda pair: pair[0])
                texts = [{"expert": int(expert), "text": "".join(text for _, text in run)} for expert, run in runs]
                panels.append({"layer": layer, "runs": texts})
            drawn.append(panels)
    except (TypeError, ValueError, LookupError):
        # The evaluation is damaged.
        rows, drawn = [], []
    count = max((len(row["shares"]) for row in rows), default=0)
    names = [f"expert {expert}" for expert in range(1, count + 1)]
    return {"names": names, "rows": rows, "stage": shown, "drawn": drawn}


def costs(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Return time, memory, tokens and operations of each step; the evaluation of a stage is in the row of the stage."""
    # A row for each step that took time, and for each stage, with its evaluation in the same row.
    taken = seconds(run)
    measuring = {name: taken.get(EVALUATE + name, stage.seconds) for name, stage in run.stages.items()}
    steps = {name: value for name, value in taken.items() if not name.startswith(EVALUATE)}
    whole = sum(steps.values())
    peaks = summary["peak_memory"]
    rows = []
    for name in sorted({*steps, *run.stages}, key=step_order):
        stage = run.stages.get(name)
        updates = stage.state.get("global_step") if stage else None
        rows.append(
            {
                "name": name,
                "time": duration(steps.get(name)),
                "bar": share_bar(steps.get(name, 0.0) / whole, None, None) if whole else "",
                "evaluation": duration(measuring.get(name)),
                "memory": " / ".join(size(peaks[of]) for of in (name, EVALUATE + name) if of in peaks) or "–",
                "updates": f"{updates:,}" if isinstance(updates, int) and updates else "–",
                "tokens": magnitude(summary["tokens"].get(name)),
                "flops": magnitude(summary["flops"].get(name)),
                "parameters": magnitude(stage.parameters if stage else None),
            }
        )
    return {
        "rows": rows,
        "time": duration(whole if steps else None),
        "evaluation": duration(sum(filter(None, measuring.values())) or None),
        "memory": size(max(peaks.values())) if peaks else "–",
        "tokens": magnitude(sum(summary["tokens"].values()) or None),
        "flops": magnitude(sum(summary["flops"].values()) or None),
    }
