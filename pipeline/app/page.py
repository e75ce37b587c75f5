"""The page: its sections, one below the other."""

from __future__ import annotations

from markupsafe import Markup

from pipeline.app import compare, rollout, voting
from pipeline.app.site import TEMPLATES, Site
from pipeline.report.load import load_run
from pipeline.report.page import render
from pipeline.report.path_picture import headline, path_boxes, title
from pipeline.report.text import visible
from pipeline.report.verdict import find_failures, shown
from pipeline.stages import STAGES

SECTIONS = {
    "path": "The path",
    "compare": "Compare",
    "prefer": "Prefer",
    "rollout": "Watch a rollout",
    "report": "Report",
}
"""The sections in order: id -> title."""


def page_html(site: Site, annotator: str | None) -> str:
    """Return the page.

    Args:
        site: The run that it shows.
        annotator: The name under which the visitor has logged in, None without a login.
    """
    run = load_run(site.run)
    steps = path_boxes(run, {kind: f"#{info.box.section}" for kind, info in STAGES.items() if info.box})
    return TEMPLATES.get_template("page.html.jinja").render(
        sections=SECTIONS,
        title=visible(title(run)),
        headline=visible(headline(run)),
        verdict=Markup(render("verdict.html.jinja", shown(run, find_failures(run)))),
        path=Markup(render("path.html.jinja", {"steps": steps})),
        about=visible(site.about, limit=2000),
        annotator=annotator,
        compare=compare.content(site),
        voting=voting.content(site),
        rollout=rollout.content(site),
    )
