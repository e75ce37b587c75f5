"""The page: its sections, one below the other, and what they look like."""

from __future__ import annotations

import os
from importlib.resources import files

# Gradio reads this when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from markupsafe import Markup

from pipeline.app import compare, rollout, voting
from pipeline.app.site import Site
from pipeline.report.load import load_run
from pipeline.report.page import headline, render
from pipeline.report.path import path_steps
from pipeline.report.text import visible
from pipeline.stages import STAGES

SECTIONS = {
    "path": "The path",
    "compare": "Compare",
    "prefer": "Prefer",
    "rollout": "Watch a rollout",
    "report": "Report",
}
"""The sections by their ids, in order."""

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
FONTS_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
"""Fonts of the visitor's machine. Gradio's own are files that the browser would have to fetch."""


def build(site: Site) -> gr.Blocks:
    """Return the page."""
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in SECTIONS.items())
    with gr.Blocks(title="Fourstage", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(f'<nav aria-label="Sections"><ul>{links}</ul></nav>', elem_id="sections", apply_default_css=False)
        with gr.Column(elem_id="path"):
            gr.HTML(path_of(site), apply_default_css=False)
        with gr.Column(elem_id="compare"):
            compare.build(site)
        with gr.Column(elem_id="prefer"):
            voting.build(site)
        with gr.Column(elem_id="rollout"):
            rollout.build(site)
        # The report is a page with styles of its own, which an iframe keeps apart.
        with gr.Column(elem_id="report"):
            gr.HTML(
                '<h2>Report</h2><p><a href="report" target="_blank">Open it alone</a></p>'
                '<iframe src="report" title="Report of the run" loading="lazy" '
                'sandbox="allow-same-origin allow-popups"></iframe>'
            )
    return blocks


def path_of(site: Site) -> str:
    """Return the picture of the run at the top of the page."""
    run = load_run(site.run)
    steps = path_steps(run, {kind: f"#{info.box.section}" for kind, info in STAGES.items() if info.box})
    return Markup("<h1>{}</h1>").format(visible(headline(run))) + Markup(render("path.html.jinja", {"steps": steps}))


def theme() -> gr.themes.Base:
    """Return Gradio's plain theme; `static/page.css` sets its colours."""
    font, font_mono = ([gr.themes.Font(name) for name in names] for names in (FONTS, FONTS_MONO))
    return gr.themes.Base(font=font, font_mono=font_mono)


def head() -> str:
    """Return what is put into the page's head: the colours of the report, and the files in `static/`."""
    colours = [files("pipeline.report") / "templates" / name for name in ("colours.css", "path.css")]
    static = sorted((files(__package__) / "static").iterdir(), key=lambda file: file.name)
    styles = [*colours, *(file for file in static if file.name.endswith(".css"))]
    scripts = [file for file in static if file.name.endswith(".js")]
    # In the head and not in Gradio's own parameter for styles, which drops the rules for dark screens.
    style, script = ("\n".join(file.read_text(encoding="utf-8") for file in found) for found in (styles, scripts))
    return f'<link rel="icon" href="data:,"><style>{style}</style><script>{script}</script>'
