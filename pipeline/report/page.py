"""index.html of one run, and the files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.files import write_text
from pipeline.report.curves import Chart, charts_of
from pipeline.report.differences import Difference
from pipeline.report.labels import stage_info
from pipeline.report.load import Run
from pipeline.report.markdown import to_markdown
from pipeline.report.summary import summarise, write_json
from pipeline.report.svg import line_chart
from pipeline.report.tables import costs, figures, gains, show_verdicts, tiles
from pipeline.report.targets import Promise, Verdict, judge
from pipeline.report.text import duration, magnitude, visible


def write_report(run: Run, found: Sequence[Difference], promises: Sequence[Promise], directory: Path) -> Path:
    """Write index.html, metrics.json and report.md of a run.

    Args:
        run: the run.
        found: its paired differences.
        promises: what it is held to; those about stages that were not run are left out.
        directory: where to; it is made if need be.

    Returns:
        The path of index.html.
    """
    verdicts = judge(run, found, promises)
    summary = summarise(run, found, verdicts)
    write_json(directory / "metrics.json", summary)
    write_text(directory / "report.md", to_markdown(run, found, verdicts, summary))
    write_text(directory / "index.html", render("page.html.jinja", page_content(run, found, verdicts, summary)))
    return directory / "index.html"


def render(template: str, content: dict[str, Any]) -> str:
    """The template of this package filled in; every string in `content` is escaped, `Markup` is not."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(content)


def page_content(
    run: Run, found: Sequence[Difference], verdicts: Sequence[Verdict], summary: dict[str, Any]
) -> dict[str, Any]:
    """What page.html.jinja shows."""
    return {
        "title": f"{run.name}: Fourstage report",
        "headline": headline(run),
        "facts": facts(summary),
        "path": str(run.path),
        "tiles": tiles(run),
        "verdicts": show_verdicts(verdicts),
        "notes": run.notes,
        "table": figures(run, by_kind=False),
        "kinds": figures(run, by_kind=True),
        "gains": gains(found),
        "answers": _answers(run),
        "silent": _silent(run),
        "traces": _traces(run),
        "charts": draw(charts_of(run)),
        "costs": costs(run, summary),
        "made": made(run, summary),
    }


def headline(run: Run) -> str:
    """One line about how far the run went."""
    names = [stage_info(name).title for name, stage in run.stages.items() if stage.metrics or stage.history]
    if len(names) < 2:
        return f"{run.name}: {names[0] if names else 'nothing yet'}"
    return f"{run.name}: from {names[0][0].lower() + names[0][1:]} to {names[-1][0].lower() + names[-1][1:]}"


def facts(summary: dict[str, Any]) -> list[str]:
    """The few facts that the headline needs: size, time, machine, seed, commit."""
    parts = []
    if summary["parameters"]:
        parts.append(f"{magnitude(max(summary['parameters'].values()))} parameters")
    if summary["seconds"]:
        parts.append(f"{duration(sum(summary['seconds'].values()))} with evaluation")
    hardware = summary["hardware"]
    device = next(
        (hardware[key] for key in ("gpu", "accelerator", "device", "processor", "cpu") if hardware.get(key)),
        None,
    )
    parts.extend([str(device)] if device else [])
    if hardware.get("cores"):
        parts.append(f"{hardware['cores']} cores")
    if summary["seed"] is not None:
        parts.append(f"seed {summary['seed']}")
    if summary["commit"]:
        commit, dirty, _ = summary["commit"].partition("-dirty")
        parts.append(f"commit {commit[:9]}{dirty}")
    return parts


def _answers(run: Run) -> list[dict[str, Any]]:
    """For each prompt, in the order of the first stage that has it, every stage's answer."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for stage in run.speakers:
        for item in stage.answers:
            text = visible(str(item["answer"])).strip()
            prompts.setdefault(str(item["prompt"]), []).append({"stage": stage.name, "text": text})
    return [{"prompt": visible(prompt), "answers": answers} for prompt, answers in prompts.items()]


def _silent(run: Run) -> str:
    names = [name for name, stage in run.stages.items() if stage.metrics and not stage_info(name).speaks]
    return f"{' and '.join(names)} scores answers and writes none." if names else ""


def _traces(run: Run) -> dict[str, Any]:
    pair = run.traced
    if pair is None:
        return {"pairs": []}
    before, after = pair
    earlier = {str(item["problem"]): item for item in before.traces}
    pairs = []
    for item in after.traces:
        sides = [(before.name, earlier.get(str(item["problem"]))), (after.name, item)]
        pairs.append(
            {
                "kind": visible(str(item["kind"])),
                "problem": visible(str(item["problem"])),
                "reference": visible(str(item.get("reference") or "")),
                "sides": [
                    {
                        "stage": name,
                        "text": visible(str(side["answer"])).strip(),
                        "correct": bool(side["correct"]) if "correct" in side else None,
                    }
                    for name, side in sides
                    if side is not None
                ],
            }
        )
    return {"before": before.name, "after": after.name, "pairs": pairs}


def draw(charts: Sequence[Chart]) -> list[dict[str, Any]]:
    """The charts as SVG, grouped by stage."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for chart in charts:
        groups.setdefault(chart.stage, []).append(
            {
                "title": chart.title,
                "note": chart.note,
                "legend": [line.name for line in chart.series],
                "svg": line_chart(chart),
            }
        )
    return [{"stage": stage, "title": stage_info(stage).title, "charts": drawn} for stage, drawn in groups.items()]


def made(run: Run, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Seed, commit, model, hardware and versions, as lists of (name, value)."""
    model = next((stage.config for stage in reversed(run.stages.values()) if stage.config), {})
    this = [("seed", summary["seed"]), ("commit", summary["commit"]), ("recipe", run.manifest.get("recipe"))]
    this += [(key, model.get(key)) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")]
    boxes = [
        ("Run", this),
        ("Hardware", list(summary["hardware"].items())),
        ("Versions", list(summary["versions"].items())),
    ]
    return [
        {
            "title": title,
            "entries": [
                (key.replace("_gib", " (GiB)").replace("_", " "), visible(str(value)))
                for key, value in entries
                if value is not None
            ],
        }
        for title, entries in boxes
    ]
