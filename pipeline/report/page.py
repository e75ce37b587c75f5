"""The report of one run: what its page (HTML) and its Markdown show.

`page_content` returns a dictionary with an entry for each part of the report, which two templates fill in,
templates/report.html.jinja and templates/report.md.jinja. The other functions return one part each.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.files import write_text
from pipeline.report.curves import Chart, charts_of, layout
from pipeline.report.differences import Difference
from pipeline.report.load import EVALUATE, Run, stage_info, step_order
from pipeline.report.path_picture import headline, path_boxes, showcase, title
from pipeline.report.summary import by_length
from pipeline.report.text import counted, duration, interval, magnitude, markdown, number, signed, visible
from pipeline.report.verdict import Finding, verdict_content
from pipeline.stages import STAGES


def write_files(directory: Path, template: str, summary: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write `summary` to metrics.json, and `content` to report.md and index.html. Return the path of index.html.

    `template` is the name of two templates without their endings: "report", or "seeds" for several runs.
    """
    # JSON without NaN, which not every parser accepts.
    write_text(directory / "metrics.json", json.dumps(summary, indent=1, allow_nan=False, default=str) + "\n")
    write_text(directory / "report.md", render(f"{template}.md.jinja", content))
    page = directory / "index.html"
    write_text(page, render(f"{template}.html.jinja", content))
    return page


def render(template: str, content: dict[str, Any]) -> str:
    """Fill in a template. Every string in `content` that is not `Markup` is made visible and escaped."""
    return _environment(template.endswith(".html.jinja")).get_template(template).render(content)


@cache
def _environment(is_page: bool) -> Environment:
    """Return the Jinja environment of the HTML templates if `is_page`, otherwise of the Markdown templates."""
    escape = visible if is_page else markdown

    # Jinja calls this for the value of every {{ expression }}.
    def finalize(value: Any) -> Any:
        return escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_page,
        finalize=finalize,
        keep_trailing_newline=True,
    )
    environment.filters["visible"] = visible
    environment.filters["code"] = lambda text: Markup(f"`{visible(text)}`".translate({ord("\n"): " ", ord("|"): "\\|"}))
    environment.filters["markdown"] = lambda text, limit: Markup(markdown(text, limit))
    environment.filters["clip"] = lambda value, low, high: max(low, min(high, value))
    for function in (interval, metric_info, number, signed, stage_info):
        environment.globals[function.__name__] = function
    return environment


def page_content(run: Run, summary: dict[str, Any], changes: Sequence[Difference]) -> dict[str, Any]:
    """Return what report.html.jinja and report.md.jinja show.

    Args:
        run: The run.
        summary: The content of its metrics.json.
        changes: Its differences between stages.
    """
    problems = showcase(run)
    charts = charts_of(run)
    answers = _answers(run)
    # A box of the path links to the part of the report about it, unless that part is empty.
    parts = {"answers": answers, "curves": charts, "gains": changes, "reasoning": problems}
    links = {kind: f"#{info.box.place}" for kind, info in STAGES.items() if info.box and parts[info.box.place]}
    # The metrics of a miniature mean nothing, so it raises no alarm.
    alarms = [] if run.is_smoke else summary["alarms"]
    findings = [Finding(**entry) for entry in summary["verdict"]]
    return {
        "name": title(run),
        "stage_info": run.info,
        "headline": headline(run),
        "facts": _facts(summary),
        "steps": path_boxes(run, links),
        "targets": summary["promises"],
        "not_measured": len(summary["promises_not_measured"]),
        "alarms": [
            f"{alarm['stage']}, step {alarm['step']}: {alarm['what']} ({number(alarm['value'])})" for alarm in alarms
        ],
        **verdict_content(run, findings),
        # A report may be published, and should not reveal paths of this machine.
        "notes": [note.replace(f"{run.path}/", "") for note in run.notes],
        "table": metric_table(run, by_kind=False),
        "kinds": metric_table(run, by_kind=True),
        "remarks": remarks(run),
        "others": _named_evaluations(run),
        "gains": [
            {"stage": stage, "reference": reference, "rows": list(rows)}
            for (stage, reference), rows in groupby(changes, key=lambda change: (change.stage, change.reference))
        ],
        "baselines": {
            name: (run.baseline_title(baseline), baseline.metrics)
            for name, baseline in run.baselines.items()
            if baseline.metrics
        },
        "answering": list(answers),
        "answers": _answers_by_prompt(answers),
        "silent": [name for name, stage in run.stages.items() if stage.metrics and not stage_info(stage).generates],
        "problems": problems,
        "lengths": lengths(run),
        "charts": draw(charts),
        "experts": experts(run),
        "costs": costs(run, summary),
        "made": _origin(run, summary),
    }


def _facts(summary: Mapping[str, Any]) -> list[str]:
    """Return the facts under the headline, such as ["1.93 M parameters", "NVIDIA H100", "16 cores", "commit 5332eef"].

    What was not recorded is omitted, except for the hardware.
    """
    facts = []
    if summary["parameters"]:
        facts.append(f"{magnitude(max(summary['parameters'].values()))} parameters")
    hardware = summary["hardware"]
    facts.append(str(hardware.get("gpu") or hardware.get("processor") or "unknown hardware"))
    if hardware.get("cores"):
        facts.append(counted(hardware["cores"], "core"))
    # A commit with changes that are not committed ends in "-dirty" and a hash of them.
    commit, dirty, _ = (summary["commit"] or "").partition("-dirty")
    if commit:
        facts.append(f"commit {commit[:9]}{dirty}")
    return facts


def _origin(run: Run, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return how the run was made, as three tables with titles: "Run", "Hardware" and "Versions".

    "Run" includes the shape of the model that the last stage wrote; a value is None if it is unknown.
    """
    model = next((stage.config for stage in reversed(run.stages.values()) if stage.config), {})
    recipe = Path(str(run.record.get("recipe") or "unknown")).name
    about = {"seed": summary["seed"], "commit": summary["commit"] or "unknown", "recipe": recipe}
    about |= {key: model.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    hardware = summary["hardware"] or {"machine": "unknown"}
    versions = summary["versions"] or {"packages": "unknown"}
    return {"Run": about, "Hardware": hardware, "Versions": versions}


def _answers(run: Run) -> dict[str, dict[str, str]]:
    """Return the answers to the fixed prompts of the evaluation, by stage and prompt; only stages that answered any."""
    answers: dict[str, dict[str, str]] = {}
    for stage in run.stages.values():
        for item in stage.answers:
            answers.setdefault(stage.name, {})[str(item["prompt"])] = str(item["answer"]).strip(" \n")
    return answers


def _answers_by_prompt(answers: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Regroup the answers by prompt: one entry for each prompt, with the answer of every stage.

    The `text` of a stage that did not answer the prompt is None.
    """
    # Stages evaluated with different settings may have been asked different prompts.
    prompts = dict.fromkeys(prompt for texts in answers.values() for prompt in texts)
    items = []
    for prompt in prompts:
        sides = [{"stage": name, "text": texts.get(prompt)} for name, texts in answers.items()]
        items.append({"prompt": prompt, "answers": sides})
    return items


def _named_evaluations(run: Run) -> list[dict[str, Any]]:
    """Return a row for each metric of each stage in the named evaluations, such as evaluations/longer/2_sft.json."""
    rows = []
    for name, stages in run.named_evaluations.items():
        for stage, metrics in stages.items():
            for metric in sorted(metrics, key=metric_order):
                rows.append({"name": name, "stage": stage, "metric": metric, "estimate": metrics[metric]})
    return rows


def metric_table(run: Run, by_kind: bool) -> dict[str, Any]:
    """Return the table of metrics: one column per stage, one row per metric (or per metric and kind of example).

    A cell is an estimate, or None if the stage lacks the metric.
    """
    stages = [stage for stage in run.stages.values() if stage.metrics]
    rows = []
    for metric in sorted({name for stage in stages for name in stage.metrics}, key=metric_order):
        estimates = [stage.metrics.get(metric) for stage in stages]
        if not by_kind:
            label = metric_info(metric).label
            meaning = metric_info(metric).meaning.replace("{against}", run.against).replace("{judge}", run.judge)
            rows.append(_table_row(metric, label, meaning, estimates))
            continue
        kinds: set[str] = set()
        for estimate in estimates:
            if estimate is not None:
                kinds.update(estimate.by_kind)
        for kind in sorted(kinds):
            of_kind = [estimate.by_kind.get(kind) if estimate else None for estimate in estimates]
            rows.append(_table_row(metric, f"{metric_info(metric).label}: {kind}", "", of_kind))
    return {"columns": [stage.name for stage in stages], "rows": rows}


def _table_row(metric: str, label: str, meaning: str, estimates: list[Estimate | None]) -> dict[str, Any]:
    """Return a row of the table of metrics. Its meaning ends with the numbers of examples: "…; n = 300 or 400"."""
    remarks = [meaning]
    counts = sorted({estimate.n for estimate in estimates if estimate is not None and estimate.n is not None})
    if counts:
        remarks.append(f"n\u00a0=\u00a0{' or '.join(f'{count:,}' for count in counts)}")
    return {"label": label, "metric": metric, "meaning": "; ".join(filter(None, remarks)), "estimates": estimates}


def remarks(run: Run) -> list[str]:
    """Return notes on how the metrics came about.

    These are examples that were omitted, answers that were cut off, test rows that are also training rows, rows of the
    training data that were lost, and a test split on which a checkpoint was chosen.
    """
    measured = [stage for stage in run.stages.values() if stage.metrics]
    stages_by_line: dict[str, list[str]] = {}
    for stage in measured:
        for line in stage.remarks():
            stages_by_line.setdefault(line, []).append(stage.name)
    # A remark that concerns every stage that generates text does not list the stages.
    generating_stages = [stage for stage in measured if stage_info(stage).generates]
    lines = []
    for line, names in stages_by_line.items():
        if len(names) < len(generating_stages):
            line = f"{line} ({', '.join(names)})"
        lines.append(line)
    for step, entry in run.steps.items():
        for lost in entry.get("lost", []):
            lines.append(f"{step}: {lost['rows']:,} of {lost['of']:,} {lost['what']}")
    for step, entry in run.steps.items():
        values = entry.get("values", {})
        evaluated_on = entry.get("evaluated_on") or values.get("dataset_test_split")
        if evaluated_on == "test" and values.get("load_best_model_at_end"):
            what = "its best checkpoint was chosen on the split test, so metrics measured on that split flatter it"
            lines.append(f"{step}: {what}; give the data set a split validation")
    return lines


def lengths(run: Run) -> dict[str, Any]:
    """Return the table of pass@1 by the length of a problem (in steps), for the last two stages that have it.

    If either was also measured on problems longer than in training, the table ends with a column "longer".
    """
    estimates = {name: by_length(stage) for name, stage in run.stages.items()}
    names = [name for name in estimates if estimates[name]][-2:]
    columns = sorted({length for name in names for length in estimates[name]}, key=int)
    cells = {name: [estimates[name].get(length) for length in columns] for name in names}
    longer = {name: run.stages[name].metrics.get("pass@1_longer") for name in names}
    if any(longer.values()):
        columns.append("longer")
        for name in names:
            cells[name].append(longer[name])
    return {"columns": columns, "rows": [{"stage": name, "estimates": cells[name]} for name in names]}


def experts(run: Run) -> dict[str, Any]:
    """Return what the report shows about a mixture of experts: the load of each expert, and texts by expert.

    Returns:
        `names` of the experts; `rows`, the loads by stage and layer (1 is balanced); `stage`, the pretraining stage, ""
        if there is none; and `drawn`, the panels of each of its texts (`_expert_panels`).
    """
    loads = {name: stage.experts["layers"] for name, stage in run.stages.items() if "layers" in stage.experts}
    rows: list[dict[str, Any]] = []
    for name, layers in loads.items():
        for layer, shares in enumerate(layers, 1):
            rows.append({"stage": name, "layer": str(layer), "shares": [number(share, 2) for share in shares]})
    # The texts are shown for pretraining, where experts specialise.
    pretrained = next((name for name in loads if run.info(name).from_scratch), "")
    texts = []
    if pretrained:
        texts = [_expert_panels(document) for document in run.stages[pretrained].experts.get("documents", [])]
    count = max((len(row["shares"]) for row in rows), default=0)
    return {"names": [f"expert {i + 1}" for i in range(count)], "rows": rows, "stage": pretrained, "drawn": texts}


def _expert_panels(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return, for each layer, the text of a document in pieces, with the expert that each piece was routed to.

    `document` has the text of each token (`pieces`) and, for each layer, the expert of each token (`chosen`).
    """
    panels = []
    for layer, chosen in enumerate(document["chosen"], 1):
        # Neighbouring tokens that went to the same expert are shown as one piece of text.
        pieces = []
        # In a damaged file, they may be of different lengths.
        tokens_with_expert = zip(chosen, document["pieces"], strict=False)
        for expert, tokens in groupby(tokens_with_expert, key=lambda token: token[0]):
            pieces.append({"expert": expert, "text": "".join(text for _, text in tokens)})
        panels.append({"layer": layer, "runs": pieces})
    return panels


def costs(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Return the table of costs: time, memory, tokens and FLOPs of each step, and totals.

    A stage and its evaluation share a row. `share` is the share of the time of all steps, None if no time is known.
    `summary` is the content of metrics.json.
    """
    seconds = summary["seconds"]
    tokens = summary["tokens"]
    flops = summary["flops"]
    peaks = summary["peak_memory"]
    evaluations = {name: seconds.get(EVALUATE + name, stage.seconds) for name, stage in run.stages.items()}
    steps = {name: value for name, value in seconds.items() if not name.startswith(EVALUATE)}
    total = sum(steps.values())
    rows = []
    for name in sorted({*steps, *run.stages}, key=step_order):
        stage = run.stages.get(name)
        updates = stage.state.get("global_step") if stage else None
        memory = [f"{magnitude(peaks[step])}B" for step in (name, EVALUATE + name) if step in peaks]
        row = {
            "name": name,
            "time": duration(steps.get(name)),
            "share": steps.get(name, 0.0) / total if total else None,
            "evaluation": duration(evaluations.get(name)),
            "memory": " / ".join(memory) or "–",
            "updates": f"{updates:,}" if isinstance(updates, int) and updates else "–",
            "tokens": magnitude(tokens.get(name)),
            "flops": magnitude(flops.get(name)),
            "parameters": magnitude(summary["parameters"].get(name)),
        }
        rows.append(row)
    return {
        "rows": rows,
        "memory": f"{magnitude(max(peaks.values()))}B" if peaks else "–",
        "time": duration(total if steps else None),
        "evaluation": duration(sum(filter(None, evaluations.values())) or None),
        "tokens": magnitude(sum(tokens.values()) or None),
        "flops": magnitude(sum(flops.values()) or None),
    }


def draw(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Return the charts as SVG, with their titles, grouped by stage."""
    groups: dict[str, dict[str, Any]] = {}
    for chart in charts:
        if chart.stage not in groups:
            stage_title = chart.stage_title or stage_info(chart.stage).title
            groups[chart.stage] = {"stage": chart.stage, "title": stage_title, "charts": []}
        svg = Markup(render("chart.html.jinja", layout(chart)))
        legend = [line.name for line in chart.series]
        groups[chart.stage]["charts"].append({"title": chart.title, "note": chart.note, "legend": legend, "svg": svg})
    return list(groups.values())
