"""The report of one run: what its page and its Markdown show."""

from __future__ import annotations

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
from pipeline.report.curves import Chart, charts_of
from pipeline.report.differences import Difference, differences
from pipeline.report.load import Run
from pipeline.report.path_picture import headline, path_boxes, showcase, title
from pipeline.report.stage_order import stage_info
from pipeline.report.summary import summarise
from pipeline.report.svg import layout
from pipeline.report.tables import costs, experts, figures, lengths, remarks
from pipeline.report.targets import Target, check_targets, is_pocket, load_targets
from pipeline.report.text import code, counted, interval, magnitude, markdown, number, signed, visible
from pipeline.report.verdict import Finding, shown
from pipeline.stages import STAGES


def report_html(run: Run) -> str:
    """Return index.html of a run, without writing it."""
    _, content = contents(run, differences(run), load_targets() if is_pocket(run) else [])
    return render("report.html.jinja", content)


def write_files(directory: Path, template: str, summary: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write `summary` to metrics.json, and `content` to report.md and index.html. Return the path of the latter."""
    # JSON that every parser reads: without NaN.
    write_text(directory / "metrics.json", json.dumps(summary, indent=1, allow_nan=False, default=str) + "\n")
    write_text(directory / "report.md", render(f"{template}.md.jinja", content))
    write_text(directory / "index.html", render(f"{template}.html.jinja", content))
    return directory / "index.html"


def render(template: str, content: dict[str, Any]) -> str:
    """Fill in a template. Every string in `content` that is not `Markup` is made visible and escaped."""
    return _environment(template.endswith(".html.jinja")).get_template(template).render(content)


def make_environment(package: str, folder: str, **options: Any) -> Environment:
    """Return the templates in a folder of a package, which fail if they name something unknown."""
    loader = PackageLoader(package, folder)
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)


@cache
def _environment(is_page: bool) -> Environment:
    show = visible if is_page else markdown
    environment = make_environment(
        "pipeline.report",
        "templates",
        autoescape=is_page,
        finalize=lambda value: show(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "visible": visible}
    environment.filters["markdown"] = lambda text, limit: Markup(markdown(text, limit))
    environment.filters["clip"] = lambda value, low, high: max(low, min(high, value))
    for function in (interval, metric_info, number, signed, stage_info):
        environment.globals[function.__name__] = function
    return environment


def contents(run: Run, found: Sequence[Difference], targets: Sequence[Target]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what metrics.json contains, and what report.html.jinja and report.md.jinja show."""
    results = check_targets(run, found, targets)
    summary = summarise(run, found, results)
    problems, charts = showcase(run), charts_of(run)
    given = {
        stage.name: {str(item["prompt"]): str(item["answer"]).strip(" \n") for item in stage.answers}
        for stage in run.answering
    }
    # Stages that were evaluated with different settings may have been asked different prompts.
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
    return summary, {
        "name": title(run),
        "headline": headline(run),
        "facts": list(filter(None, facts)),
        "steps": path_boxes(run, links),
        "targets": summary["promises"],
        "alarms": [
            f"{item['stage']}, step {item['step']}: {item['what']} ({number(item['value'])})"
            for item in ([] if run.is_smoke else summary["alarms"])
        ],
        **shown(run, [Finding(**item) for item in summary["verdict"]]),
        # A report may be published, and where its files lay on this machine is nobody's business.
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
            {
                "stage": stage,
                "before": before,
                "baseline": run.baseline_title(run.baselines[before]) if before in run.baselines else "",
                "rows": list(changes),
            }
            for (stage, before), changes in groupby(found, key=lambda item: (item.stage, item.before))
        ],
        "answering": list(given),
        "answers": [
            {"prompt": prompt, "answers": [{"stage": name, "text": texts.get(prompt)} for name, texts in given.items()]}
            for prompt in prompts
        ],
        "silent": [name for name, stage in run.stages.items() if stage.metrics and not stage_info(name).generates],
        "problems": problems,
        "lengths": lengths(run),
        "charts": draw(charts),
        "experts": experts(run),
        "costs": costs(run, summary),
        "made": provenance(run, summary),
    }


def draw(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """Return the charts as SVG, grouped by stage."""
    groups: dict[str, dict[str, Any]] = {}
    for chart in charts:
        legend = [line.name for line in chart.series]
        svg = Markup(render("chart.html.jinja", layout(chart)))
        group = {"stage": chart.stage, "title": stage_info(chart.stage).title, "charts": []}
        groups.setdefault(chart.stage, group)["charts"].append(
            {"title": chart.title, "note": chart.note, "legend": legend, "svg": svg}
        )
    return list(groups.values())


def provenance(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Return seed, commit, model, hardware and versions as lists of (name, value)."""
    # The shape of the model that the last stage wrote.
    model = next((stage.config for stage in reversed(run.stages.values()) if stage.config), {})
    about = {
        "seed": summary["seed"],
        "commit": summary["commit"] or "unknown",
        "recipe": Path(str(run.record.get("recipe") or "unknown")).name,
        **{key: model.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")},
    }
    hardware = summary["hardware"] or {"machine": "unknown"}
    boxes = {"Run": about, "Hardware": hardware, "Versions": summary["versions"] or {"packages": "unknown"}}
    return [
        {
            "title": title,
            "entries": [
                (key.replace("_gib", " (GiB)").replace("_", " "), str(value))
                for key, value in entries.items()
                if value is not None
            ],
        }
        for title, entries in boxes.items()
    ]
