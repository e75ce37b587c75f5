"""The tables of the page: what the template fills in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report.differences import Difference, by_stage
from pipeline.report.formatting import duration, interval, magnitude, number, signed
from pipeline.report.promises import Verdict
from pipeline.report.reading import Measurement, Run, Stage
from pipeline.report.summary import seconds, training_cost
from pipeline.report.svg import interval_bar, share_bar
from pipeline.report.vocabulary import METRICS, metric_info, metric_order, stage_info, stage_order


def tiles(run: Run) -> list[dict[str, str]]:
    """For each stage that is trained for something: its first aim, before and after."""
    shown = []
    before: Stage | None = None
    for stage in run.stages.values():
        info = stage_info(stage.name)
        aim = next((name for name in info.aims if name in stage.metrics), None)
        if aim is not None:
            digits = metric_info(aim).digits if aim == "bits_per_byte" else 2
            # The stage before is often 2_sft itself, which wins half of the time by definition.
            was = (
                before.metrics.get(aim) if before is not None and info.speaks and aim != "win_rate" else None
            )
            shown.append(
                {
                    "stage": info.title,
                    "label": metric_info(aim).label + (" against 2_sft" if aim == "win_rate" else ""),
                    "was": number(was.value, digits) if was else "",
                    "now": number(stage.metrics[aim].value, digits),
                }
            )
        if info.speaks and stage.metrics:
            before = stage
    return shown


def show_verdicts(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Promises as text."""
    return [
        {"promise": str(item.promise), "measured": number(item.measured), "kept": item.kept}
        for item in verdicts
    ]


def figures(run: Run, by_kind: bool) -> dict[str, Any]:
    """Rows of metrics (or of metric and kind), columns of stages."""
    stages = [stage for stage in run.stages.values() if stage.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        info = metric_info(metric)
        whole = [stage.metrics.get(metric) for stage in stages]
        kinds = sorted({kind for item in whole if item for kind in item.by_kind}) if by_kind else [""]
        for kind in kinds:
            picked = [(item.by_kind.get(kind) if kind else item) if item else None for item in whole]
            cells = [
                _cell(measurement, metric, metric in stage_info(stage.name).aims)
                for stage, measurement in zip(stages, picked, strict=True)
            ]
            rows.append(
                {
                    "label": f"{info.label}: {kind}" if kind else info.label,
                    "meaning": "" if kind else info.meaning,
                    "arrow": {"up": "↑", "down": "↓", "": ""}[info.better],
                    "direction": {"up": "higher is better", "down": "lower is better", "": ""}[info.better],
                    "cells": cells,
                }
            )
    columns = [{"name": stage.name, "title": stage_info(stage.name).title} for stage in stages]
    return {"columns": columns, "rows": rows}


def _cell(measurement: Measurement | None, metric: str, aim: bool) -> dict[str, Any] | None:
    if measurement is None:
        return None
    digits = metric_info(metric).digits
    is_share = metric in METRICS and metric not in ("bits_per_byte", "mean_length")
    bar = share_bar(measurement.value, measurement.low, measurement.high) if is_share else ""
    return {
        "value": number(measurement.value, digits),
        "range": interval(measurement, digits),
        "bar": bar,
        "aim": aim,
    }


def sizes(run: Run) -> str:
    """How many examples each metric has, in words."""
    counts: dict[str, set[int]] = {}
    for stage in run.stages.values():
        for metric, measurement in stage.metrics.items():
            if measurement.n is not None:
                counts.setdefault(metric, set()).add(measurement.n)
    parts = [
        f"{metric_info(metric).label} {' or '.join(f'{n:,}' for n in sorted(counts[metric]))}"
        for metric in sorted(counts, key=metric_order)
    ]
    return f"Examples: {', '.join(parts)}." if parts else ""


def gains(found: Sequence[Difference]) -> list[dict[str, Any]]:
    reach: dict[str, float] = {}
    for item in found:
        ends = [abs(end) for end in (item.change.value, item.change.low, item.change.high) if end is not None]
        reach[item.metric] = max([reach.get(item.metric, 0.0), *ends])
    groups = []
    for stage, rows in by_stage(list(found)).items():
        shown = []
        for item in rows:
            info = metric_info(item.metric)
            title = f"Change of {info.label} from {item.before} to {stage}"
            shown.append(
                {
                    "label": info.label,
                    "aim": item.aim,
                    "was": number(item.was, info.digits),
                    "now": number(item.now, info.digits),
                    "change": signed(item.change.value, info.digits),
                    "range": interval(item.change, info.digits, sign=True),
                    "bar": interval_bar(item.change, reach[item.metric] or 1.0, item.verdict, title),
                    "verdict": item.verdict,
                    "n": f"{item.change.n:,}" if item.change.n is not None else "–",
                }
            )
        groups.append(
            {"stage": stage, "before": rows[0].before, "title": stage_info(stage).title, "rows": shown}
        )
    return groups


def costs(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    taken = seconds(run)
    names = sorted({*taken, *run.stages}, key=stage_order)
    longest = max(taken.values(), default=0.0)
    rows = []
    for name in names:
        stage = run.stages.get(name)
        tokens, flops = training_cost(stage) if stage else (None, None)
        updates = stage.state.get("global_step") if stage else None
        rows.append(
            {
                "name": name,
                "time": duration(taken.get(name)),
                "bar": share_bar(taken.get(name, 0.0) / longest, None, None) if longest else "",
                "evaluation": duration(stage.evaluation_seconds if stage else None),
                "updates": f"{updates:,}" if isinstance(updates, int) and updates else "–",
                "tokens": magnitude(tokens),
                "flops": magnitude(flops),
                "parameters": magnitude(stage.parameters if stage else None),
            }
        )
    evaluation = [
        stage.evaluation_seconds for stage in run.stages.values() if stage.evaluation_seconds is not None
    ]
    return {
        "rows": rows,
        "time": duration(sum(taken.values()) if taken else None),
        "evaluation": duration(sum(evaluation) if evaluation else None),
        "tokens": magnitude(sum(summary["tokens"].values()) or None),
        "flops": magnitude(sum(summary["flops"].values()) or None),
    }
