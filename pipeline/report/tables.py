"""The tables of the report, as the templates fill them in."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.report.load import Run
from pipeline.report.stage_order import EVALUATE, stage_info, step_order
from pipeline.report.summary import by_length
from pipeline.report.text import duration, magnitude, number


def figures(run: Run, by_kind: bool) -> dict[str, Any]:
    """Return one row per metric (or per metric and kind of example), with an estimate or None for each stage."""
    stages = [stage for stage in run.stages.values() if stage.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        info = metric_info(metric)
        whole = [stage.metrics.get(metric) for stage in stages]
        for kind in sorted({kind for item in whole if item for kind in item.by_kind}) if by_kind else [""]:
            estimates = [item.by_kind.get(kind) if item and kind else item for item in whole]
            label = f"{info.label}: {kind}" if kind else info.label
            meaning = "" if kind else info.meaning.replace("{against}", run.against).replace("{judge}", run.judge)
            counts = sorted({item.n for item in estimates if item is not None and item.n is not None})
            n = f"n\u00a0=\u00a0{' or '.join(f'{count:,}' for count in counts)}" if counts else ""
            meaning = "; ".join(filter(None, (meaning, n)))
            rows.append({"label": label, "metric": metric, "meaning": meaning, "estimates": estimates})
    baselines = [
        {"name": item.name, "title": run.baseline_title(item), "metrics": item.metrics}
        for item in run.baselines.values()
        if item.metrics
    ]
    return {"columns": [stage.name for stage in stages], "baselines": baselines, "rows": rows}


def remarks(run: Run) -> list[str]:
    """Return notes on how the stages were measured: what was not measured, cut off or trained on."""
    measured = [stage for stage in run.stages.values() if stage.metrics]
    lines: dict[str, list[str]] = {}
    for stage in measured:
        for line in stage.remarks():
            lines.setdefault(line, []).append(stage.name)
    # What is said of every stage that writes text does not name them.
    of_all = len([stage for stage in measured if stage_info(stage.name).generates])
    shown = [line if len(names) >= of_all else f"{line} ({', '.join(names)})" for line, names in lines.items()]
    lost = [(step, one) for step, entry in run.steps.items() for one in entry.get("lost", [])]
    return shown + [f"{step}: {one['rows']:,} of {one['of']:,} {one['what']}" for step, one in lost]


def lengths(run: Run) -> dict[str, Any]:
    """Return the pass@1 of the last two stages by the length of the problem, and of those longer than in training."""
    measured = [(stage, found) for stage in run.stages.values() if (found := by_length(stage))][-2:]
    columns = sorted({length for _, found in measured for length in found}, key=int)
    rows = [{"stage": stage.name, "estimates": list(map(found.get, columns))} for stage, found in measured]
    longer = [stage.metrics.get("pass@1_longer") for stage, _ in measured]
    if any(longer):
        columns.append("longer")
        rows = [{**row, "estimates": [*row["estimates"], one]} for row, one in zip(rows, longer, strict=True)]
    return {"columns": columns, "rows": rows}


def experts(run: Run) -> dict[str, Any]:
    """Return the load of each expert in every stage, and the tokens that it took of some texts in pretraining."""
    loads = {name: stage.experts["layers"] for name, stage in run.stages.items() if "expert_load" in stage.metrics}
    rows = [
        {"stage": name, "layer": str(layer), "shares": [number(share, 2) for share in shares]}
        for name, layers in loads.items()
        for layer, shares in enumerate(layers, 1)
    ]
    # The texts are read by pretraining, where experts specialise.
    shown = next((name for name in loads if stage_info(name).from_scratch), "")
    drawn = []
    for item in run.stages[shown].experts["documents"] if shown else ():
        panels = []
        for layer, chosen in enumerate(item["chosen"], 1):
            # Neighbouring tokens that went to the same expert are shown as one piece of text.
            pieces = groupby(zip(chosen, item["pieces"], strict=True), key=lambda pair: pair[0])
            texts = [{"expert": expert, "text": "".join(text for _, text in of_expert)} for expert, of_expert in pieces]
            panels.append({"layer": layer, "runs": texts})
        drawn.append(panels)
    count = max((len(row["shares"]) for row in rows), default=0)
    return {"names": [f"expert {i + 1}" for i in range(count)], "rows": rows, "stage": shown, "drawn": drawn}


def costs(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Return time, memory, tokens and operations of each step and stage, whose evaluation is in the same row."""
    taken, tokens, flops, peaks = (summary[key] for key in ("seconds", "tokens", "flops", "peak_memory"))
    measuring = {name: taken.get(EVALUATE + name, stage.seconds) for name, stage in run.stages.items()}
    steps = {name: value for name, value in taken.items() if not name.startswith(EVALUATE)}
    whole = sum(steps.values())
    rows = []
    for name in sorted({*steps, *run.stages}, key=step_order):
        stage = run.stages.get(name)
        updates = stage.state.get("global_step") if stage else None
        row = {
            "name": name,
            "time": duration(steps.get(name)),
            "share": steps.get(name, 0.0) / whole if whole else None,
            "evaluation": duration(measuring.get(name)),
            "memory": " / ".join(f"{magnitude(peaks[of])}B" for of in (name, EVALUATE + name) if of in peaks) or "–",
            "updates": f"{updates:,}" if isinstance(updates, int) and updates else "–",
            "tokens": magnitude(tokens.get(name)),
            "flops": magnitude(flops.get(name)),
            "parameters": magnitude(summary["parameters"].get(name)),
        }
        rows.append(row)
    return {
        "rows": rows,
        "time": duration(whole if steps else None),
        "evaluation": duration(sum(filter(None, measuring.values())) or None),
        "memory": f"{magnitude(max(peaks.values()))}B" if peaks else "–",
        "tokens": magnitude(sum(tokens.values()) or None),
        "flops": magnitude(sum(flops.values()) or None),
    }
