"""The tables of the report, as the templates fill them in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.evaluation.results import StageResult
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.stage_order import EVALUATE, stage_info, step_order
from pipeline.report.summary import by_length, seconds
from pipeline.report.targets import TargetResult
from pipeline.report.text import duration, magnitude, number
from pipeline.stages import find_baseline


def show_targets(results: Sequence[TargetResult], prefix: str = "") -> list[dict[str, Any]]:
    """Return targets as text, each with `prefix` before it."""
    return [
        {"target": f"{prefix}{item.target}", "measured": number(item.measured), "met": item.met} for item in results
    ]


def figures(run: Run, by_kind: bool) -> dict[str, Any]:
    """Return one row per metric (or per metric and kind of example), with an estimate or None for each stage."""
    stages = [stage for stage in run.stages.values() if stage.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        info = metric_info(metric)
        whole = [stage.metrics.get(metric) for stage in stages]
        kinds = sorted({kind for item in whole if item for kind in item.by_kind}) if by_kind else [""]
        for kind in kinds:
            estimates = [item.by_kind.get(kind) if item and kind else item for item in whole]
            label = f"{info.label}: {kind}" if kind else info.label
            meaning = "" if kind else info.meaning.replace("{against}", run.against).replace("{judge}", run.judge)
            counts = sorted({item.n for item in estimates if item is not None and item.n is not None})
            n = f"n\u00a0=\u00a0{' or '.join(f'{count:,}' for count in counts)}" if counts else ""
            meaning = "; ".join(filter(None, (meaning, n)))
            rows.append({"label": label, "metric": metric, "meaning": meaning, "estimates": estimates})
    baselines = [
        {"name": item.name, "title": baseline_title(run, item), "metrics": item.metrics}
        for item in run.baselines.values()
        if item.metrics
    ]
    return {"columns": [stage.name for stage in stages], "baselines": baselines, "rows": rows}


def baseline_title(run: Run, baseline: StageResult) -> str:
    """Return what a baseline is called, with the text or texts that its answers share."""
    # A text may be nothing but a line break.
    texts = dict.fromkeys(str(text).replace("\n", "⏎") for text in baseline.texts.get(baseline.name, {}).values())
    known = find_baseline(baseline.name)
    title = (known.title if known else baseline.name).replace("{against}", run.against)
    return f"{title} {' or '.join(f'“{text}”' for text in texts)}".strip()


def remarks(run: Run) -> list[str]:
    """Return notes on how the stages were measured: what was not measured, cut off or trained on."""
    measured = [stage for stage in run.stages.values() if stage.metrics]
    lines: dict[str, list[str]] = {}
    for stage in measured:
        for line in stage.remarks():
            lines.setdefault(line, []).append(stage.name)
    for step, entry in run.steps.items():
        for lost in entry.get("lost", []):
            lines[f"{step}: {lost['rows']:,} of {lost['of']:,} {lost['what']}"] = [""] * len(run.stages)
    # What is said of every stage that writes text does not name them.
    of_all = len([stage for stage in measured if stage_info(stage.name).generates])
    return [line if len(names) >= of_all else f"{line} ({', '.join(names)})" for line, names in lines.items()]


def lengths(run: Run) -> dict[str, Any]:
    """Return the pass@1 of the last two stages by the length of the problem, and of those longer than in training."""
    measured = [(name, of_stage) for name, stage in run.stages.items() if (of_stage := by_length(stage))]
    found = dict(measured[-2:])
    columns = sorted({length for of_stage in found.values() for length in of_stage}, key=int)
    rows: list[dict[str, Any]] = [
        {"stage": name, "estimates": list(map(of_stage.get, columns))} for name, of_stage in found.items()
    ]
    longer = [run.stages[name].metrics.get("pass@1_longer") for name in found]
    if any(longer):
        columns.append("longer")
        for row, estimate in zip(rows, longer, strict=True):
            row["estimates"].append(estimate)
    return {"columns": columns, "rows": rows}


def others(run: Run) -> list[dict[str, Any]]:
    """Return the figures of the evaluations with a name."""
    return [
        {"name": name, "stage": stage, "metric": metric, "estimate": metrics[metric]}
        for name, stages in run.others.items()
        for stage, metrics in stages.items()
        for metric in sorted(metrics, key=metric_order)
    ]


def gains(run: Run, found: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return the paired differences grouped by their two stages."""
    return [
        {
            "stage": stage,
            "before": before,
            "baseline": baseline_title(run, run.baselines[before]) if before in run.baselines else "",
            "rows": list(changes),
        }
        for (stage, before), changes in groupby(found, key=lambda item: (item.stage, item.before))
    ]


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
    names = [f"expert {expert}" for expert in range(1, count + 1)]
    return {"names": names, "rows": rows, "stage": shown, "drawn": drawn}


def costs(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Return time, memory, tokens and operations of each step and stage, whose evaluation is in the same row."""
    taken = seconds(run)
    measuring = {name: taken.get(EVALUATE + name, stage.seconds) for name, stage in run.stages.items()}
    steps = {name: value for name, value in taken.items() if not name.startswith(EVALUATE)}
    whole = sum(steps.values())
    peaks = summary["peak_memory"]
    memory = {of: f"{magnitude(peak)}B" for of, peak in peaks.items()}
    rows = []
    for name in sorted({*steps, *run.stages}, key=step_order):
        stage = run.stages.get(name)
        updates = stage.state.get("global_step") if stage else None
        rows.append(
            {
                "name": name,
                "time": duration(steps.get(name)),
                "share": steps.get(name, 0.0) / whole if whole else None,
                "evaluation": duration(measuring.get(name)),
                "memory": " / ".join(memory[of] for of in (name, EVALUATE + name) if of in memory) or "–",
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
        "memory": f"{magnitude(max(peaks.values()))}B" if peaks else "–",
        "tokens": magnitude(sum(summary["tokens"].values()) or None),
        "flops": magnitude(sum(summary["flops"].values()) or None),
    }
