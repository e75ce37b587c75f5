"""The report of one run: the content of its page and its Markdown."""

import json
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.files import write_text
from pipeline.report.curves import Chart, charts_of, layout
from pipeline.report.differences import Difference
from pipeline.report.load import EVALUATE, Run, stage_info, step_order
from pipeline.report.path_picture import headline, path_boxes, showcase, title
from pipeline.report.summary import by_length, summarise
from pipeline.report.targets import Target
from pipeline.report.text import counted, duration, interval, magnitude, markdown, number, signed, visible
from pipeline.report.verdict import shown
from pipeline.stages import STAGES


def write_files(directory: Path, template: str, summary: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write `summary` to metrics.json, and `content` to report.md and index.html. Return the path of the latter."""
    # JSON without NaN, which not every parser accepts.
    write_text(directory / "metrics.json", json.dumps(summary, indent=1, allow_nan=False, default=str) + "\n")
    write_text(directory / "report.md", render(f"{template}.md.jinja", content))
    write_text(directory / "index.html", render(f"{template}.html.jinja", content))
    return directory / "index.html"


def render(template: str, content: dict[str, Any]) -> str:
    """Fill in a template. Every string in `content` that is not `Markup` is made visible and escaped."""
    return _environment(template.endswith(".html.jinja")).get_template(template).render(content)


@cache
def _environment(is_page: bool) -> Environment:
    show = visible if is_page else markdown
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_page,
        finalize=lambda value: show(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    environment.filters["code"] = lambda text: Markup(f"`{visible(text)}`".translate({ord("\n"): " ", ord("|"): "\\|"}))
    environment.filters["markdown"] = lambda text, limit: Markup(markdown(text, limit))
    environment.filters["clip"] = lambda value, low, high: max(low, min(high, value))
    for function in (interval, metric_info, number, signed, stage_info):
        environment.globals[function.__name__] = function
    return environment


def contents(run: Run, found: Sequence[Difference], targets: Sequence[Target]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what metrics.json contains, and what report.html.jinja and report.md.jinja show."""
    summary = summarise(run, found, targets)
    problems, charts = showcase(run), charts_of(run)
    given: dict[str, dict[str, str]] = {}
    for stage in run.stages.values():
        for item in stage.answers:
            given.setdefault(stage.name, {})[str(item["prompt"])] = str(item["answer"]).strip(" \n")
    # Stages evaluated with different settings may have been asked different prompts.
    prompts = dict.fromkeys(prompt for answers in given.values() for prompt in answers)
    # A box of the path leads to the part of the report about it, if there is one.
    parts = {"answers": given, "curves": charts, "gains": found, "reasoning": problems}
    links = {kind: f"#{info.box.place}" for kind, info in STAGES.items() if info.box and parts[info.box.place]}
    hardware = summary["hardware"]
    # A commit with changes that are not committed ends in "-dirty" and a hash of them.
    commit, dirty, _ = (summary["commit"] or "").partition("-dirty")
    facts = [
        f"{magnitude(max(summary['parameters'].values()))} parameters" if summary["parameters"] else "",
        str(hardware.get("gpu") or hardware.get("processor") or "unknown hardware"),
        counted(hardware["cores"], "core") if hardware.get("cores") else "",
        f"commit {commit[:9]}{dirty}" if commit else "",
    ]
    # None stands for what is not known about the run and about the model that its last stage wrote.
    model = next((stage.config for stage in reversed(run.stages.values()) if stage.config), {})
    recipe = Path(str(run.record.get("recipe") or "unknown")).name
    about = {"seed": summary["seed"], "commit": summary["commit"] or "unknown", "recipe": recipe}
    about |= {key: model.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    versions = summary["versions"] or {"packages": "unknown"}
    return summary, {
        "name": title(run),
        "stage_info": run.info,
        "headline": headline(run),
        "facts": list(filter(None, facts)),
        "steps": path_boxes(run, links),
        "targets": summary["promises"],
        "not_measured": len(summary["promises_not_measured"]),
        "alarms": [
            f"{item['stage']}, step {item['step']}: {item['what']} ({number(item['value'])})"
            for item in ([] if run.is_smoke else summary["alarms"])
        ],
        **shown(run),
        # A report may be published, and should not reveal paths of this machine.
        "notes": [note.replace(f"{run.path}/", "") for note in run.notes],
        "table": figures(run, by_kind=False),
        "kinds": figures(run, by_kind=True),
        "remarks": remarks(run),
        "others": [
            {"name": name, "stage": stage, "metric": metric, "estimate": metrics[metric]}
            for name, stages in run.others.items()
            for stage, metrics in stages.items()
            for metric in sorted(metrics, key=metric_order)
        ],
        "gains": [
            {"stage": stage, "before": before, "rows": list(changes)}
            for (stage, before), changes in groupby(found, key=lambda item: (item.stage, item.before))
        ],
        "baselines": {it.name: (run.baseline_title(it), it.metrics) for it in run.baselines.values() if it.metrics},
        "answering": list(given),
        "answers": [
            {"prompt": prompt, "answers": [{"stage": name, "text": texts.get(prompt)} for name, texts in given.items()]}
            for prompt in prompts
        ],
        "silent": [name for name, stage in run.stages.items() if stage.metrics and not stage_info(stage).generates],
        "problems": problems,
        "lengths": lengths(run),
        "charts": draw(charts),
        "experts": experts(run),
        "costs": costs(run, summary),
        "made": {"Run": about, "Hardware": hardware or {"machine": "unknown"}, "Versions": versions},
    }


def figures(run: Run, by_kind: bool) -> dict[str, Any]:
    """Return one row per metric (or per metric and kind of example), with an estimate or None for each stage."""
    stages = [stage for stage in run.stages.values() if stage.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        info, whole = metric_info(metric), [stage.metrics.get(metric) for stage in stages]
        for kind in sorted({kind for item in whole if item for kind in item.by_kind}) if by_kind else [""]:
            estimates = [item.by_kind.get(kind) if item and kind else item for item in whole]
            label = f"{info.label}: {kind}" if kind else info.label
            meaning = "" if kind else info.meaning.replace("{against}", run.against).replace("{judge}", run.judge)
            counts = sorted({item.n for item in estimates if item is not None and item.n is not None})
            n = f"n\u00a0=\u00a0{' or '.join(f'{count:,}' for count in counts)}" if counts else ""
            said = "; ".join(filter(None, (meaning, n)))
            rows.append({"label": label, "metric": metric, "meaning": said, "estimates": estimates})
    return {"columns": [stage.name for stage in stages], "rows": rows}


def remarks(run: Run) -> list[str]:
    """Return notes on how the stages were measured: what was not measured, cut off or trained on."""
    measured = [stage for stage in run.stages.values() if stage.metrics]
    lines: dict[str, list[str]] = {}
    for stage in measured:
        for line in stage.remarks():
            lines.setdefault(line, []).append(stage.name)
    # Remarks about every stage that writes text do not name the stages.
    of_all = len([stage for stage in measured if stage_info(stage).generates])
    shown = [line if len(names) >= of_all else f"{line} ({', '.join(names)})" for line, names in lines.items()]
    lost = [(step, one) for step, entry in run.steps.items() for one in entry.get("lost", [])]
    shown += [f"{step}: {one['rows']:,} of {one['of']:,} {one['what']}" for step, one in lost]
    for step, entry in run.steps.items():
        values = entry.get("values", {})
        evaluated_on = entry.get("evaluated_on") or values.get("dataset_test_split")
        if evaluated_on == "test" and values.get("load_best_model_at_end"):
            what = "its best checkpoint was chosen on the split test, so figures measured on that split flatter it"
            shown.append(f"{step}: {what}; give the data set a split validation")
    return shown


def lengths(run: Run) -> dict[str, Any]:
    """Return pass@1 of the last two stages by problem length, and for problems longer than in training."""
    measured = [(stage, found) for stage in run.stages.values() if (found := by_length(stage))][-2:]
    columns = sorted({length for _, found in measured for length in found}, key=int)
    rows = [{"stage": stage.name, "estimates": list(map(found.get, columns))} for stage, found in measured]
    longer = [stage.metrics.get("pass@1_longer") for stage, _ in measured]
    if any(longer):
        columns.append("longer")
        rows = [{**row, "estimates": [*row["estimates"], one]} for row, one in zip(rows, longer, strict=True)]
    return {"columns": columns, "rows": rows}


def experts(run: Run) -> dict[str, Any]:
    """Return the load of each expert in every stage, and the tokens that it took in some texts in pretraining."""
    loads = {name: stage.experts["layers"] for name, stage in run.stages.items() if "expert_load" in stage.metrics}
    rows: list[dict[str, Any]] = []
    for name, layers in loads.items():
        for layer, shares in enumerate(layers, 1):
            rows.append({"stage": name, "layer": str(layer), "shares": [number(share, 2) for share in shares]})
    # The texts are shown for pretraining, where experts specialise.
    shown = next((name for name in loads if run.info(name).from_scratch), "")
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
    """Return time, memory, tokens and FLOPs of each step and stage; a stage's evaluation is in the same row."""
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
    times = {"time": whole if steps else None, "evaluation": sum(filter(None, measuring.values())) or None}
    together = {name: duration(time) for name, time in times.items()}
    together |= {"tokens": magnitude(sum(tokens.values()) or None), "flops": magnitude(sum(flops.values()) or None)}
    return {"rows": rows, "memory": f"{magnitude(max(peaks.values()))}B" if peaks else "–", **together}


def draw(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for chart in charts:
        legend, svg = [line.name for line in chart.series], Markup(render("chart.html.jinja", layout(chart)))
        shown = {"title": chart.title, "note": chart.note, "legend": legend, "svg": svg}
        group = {"stage": chart.stage, "title": chart.stage_title or stage_info(chart.stage).title, "charts": []}
        groups.setdefault(chart.stage, group)["charts"].append(shown)
    return list(groups.values())
