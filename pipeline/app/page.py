"""The page: its sections, one below the other, and what they look like."""

from __future__ import annotations

import os
import threading
from importlib.resources import files

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from markupsafe import Markup

from pipeline.app import compare, prefer, rollout
from pipeline.app.site import Site
from pipeline.errors import UserError
from pipeline.report.load import load_run
from pipeline.report.page import headline, render, report_html
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
            prefer.build(site)
        with gr.Column(elem_id="rollout"):
            rollout.build(site)
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


def report_of(site: Site) -> str:
    """Return the report of the run as it is now."""
    return report_html(load_run(site.run))


def warm_up(site: Site) -> None:
    """Load the models of the run in the background, so that the first visitor does not wait for them."""

    def load() -> None:
        for name in site.models.stages:
            try:
                site.models.get(name)
            except UserError as error:
                print(error, flush=True)

    threading.Thread(target=load, daemon=True).start()


def theme() -> gr.themes.Base:
    """Return a theme with fonts of the visitor's machine; Gradio's own are fetched."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
    return gr.themes.Base(
        font=[SystemFont(name) for name in sans],
        font_mono=[SystemFont(name) for name in ("ui-monospace", "Menlo", "Consolas", "monospace")],
    )


class SystemFont(gr.themes.Font):
    """A font of the visitor's machine."""

    def stylesheet(self) -> dict[str, str | None]:
        """Return nothing to fetch."""
        return {"url": None, "css": None}


def style() -> str:
    """Return the style sheet: the colours of the report and the rules of the page."""
    shared = files("pipeline.report") / "templates"
    return "".join((shared / name).read_text(encoding="utf-8") for name in ("colours.css", "path.css")) + _static(
        ".css"
    )


def head() -> str:
    """Return what is put into the page's head. Gradio's own parameter for styles drops rules for dark screens."""
    return f'<link rel="icon" href="data:,"><style>{style()}</style><script>{_static(".js")}</script>'


def _static(suffix: str) -> str:
    folder = files(__package__) / "static"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(suffix)), key=lambda f: f.name)
    return "\n".join(file.read_text(encoding="utf-8") for file in found)
