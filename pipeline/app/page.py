"""The page: its sections, one below the other, and what they look like."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files

# Gradio reads this when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from markupsafe import Markup

from pipeline.app import compare, rollout, voting
from pipeline.app.site import Site
from pipeline.report.load import load_run
from pipeline.report.page import render
from pipeline.report.path_picture import headline, path_boxes, title
from pipeline.report.text import visible
from pipeline.report.verdict import find_failures, shown
from pipeline.stages import STAGES


def build(site: Site) -> gr.Blocks:
    """Return the page."""
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in SECTIONS.items())
    with gr.Blocks(title="Fourstage", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f'<nav aria-label="Sections"><ul>{links}</ul></nav>', elem_id="sections", apply_default_css=False)
        for name, (_, add) in SECTIONS.items():
            with gr.Column(elem_id=name):
                add(site)
    return blocks


def build_path(site: Site) -> None:
    """Add the picture of the run, whose boxes lead to the sections."""
    run = load_run(site.run)
    steps = path_boxes(run, {kind: f"#{info.box.section}" for kind, info in STAGES.items() if info.box})
    heading = Markup("<h1>{}</h1><p>{}</p>").format(visible(title(run)), visible(headline(run)))
    verdict = Markup(render("verdict.html.jinja", shown(run, find_failures(run))))
    gr.HTML(heading + verdict + Markup(render("path.html.jinja", {"steps": steps})), apply_default_css=False)


def build_report(site: Site) -> None:
    """Add the report, which the server answers with at `/report`."""
    # It is a page with styles of its own, which an iframe keeps apart from these.
    gr.HTML(
        '<h2>Report</h2><p><a href="report" target="_blank">Open it alone</a></p>'
        '<iframe src="report" title="Report of the run" loading="lazy" '
        'sandbox="allow-same-origin allow-popups"></iframe>'
    )


SECTIONS: dict[str, tuple[str, Callable[[Site], None]]] = {
    "path": ("The path", build_path),
    "compare": ("Compare", compare.build),
    "prefer": ("Prefer", voting.build),
    "rollout": ("Watch a rollout", rollout.build),
    "report": ("Report", build_report),
}
"""The sections in order: id -> title, and the function that adds it to the page."""


def head() -> str:
    """Return what is put into the page's head: the colours of the report, and the files in `static/`."""
    colours = [files("pipeline.report") / "templates" / name for name in ("colours.css", "path.css")]
    static = sorted((files(__package__) / "static").iterdir(), key=lambda file: file.name)
    styles = [*colours, *(file for file in static if file.name.endswith(".css"))]
    scripts = [file for file in static if file.name.endswith(".js")]
    # Gradio's own parameter for styles drops the rules for dark screens, but the head is left as it is.
    style, script = ("\n".join(file.read_text(encoding="utf-8") for file in found) for found in (styles, scripts))
    return f'<link rel="icon" href="data:,"><style>{style}</style><script>{script}</script>'
