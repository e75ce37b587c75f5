"""Prefer: which of two answers is better? The section of the page, and what it asks the server for.

The section is a small client of its own, `static/prefer.js`, because a vote must be sent again until it is confirmed,
also to a server that was started anew. A pair comes without the names of its models; what the simulated annotators and
the reward model would have said is answered only for a pair that has the annotator's vote.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import APIRouter, HTTPException, Request
from markdown_it import MarkdownIt

from pipeline.app.pairs import Pair
from pipeline.app.poll import Ballot, Page, Poll, Typed, default_source
from pipeline.app.site import Site
from pipeline.data.votes import OTHER, Conflict
from pipeline.errors import UserError
from pipeline.report.text import visible

LONGEST = 200_000
"""Characters of a text that the page shows."""


def build(site: Site) -> None:
    """Add the section to the page."""
    template = (files(__package__) / "static" / "prefer.html").read_text(encoding="utf-8")
    guidelines = site.options.guidelines or files(__package__) / "static" / "guidelines.md"
    # Without raw HTML and images, nothing in the file acts on the page or is fetched from elsewhere.
    markdown = MarkdownIt("commonmark", {"html": False}).disable("image")
    parts = {"guidelines": markdown.render(guidelines.read_text(encoding="utf-8"))}
    chosen = default_source(site)
    for side, name in zip("ab", chosen, strict=True):
        options = (f"<option{' selected' * (one == name)}>{escape(one)}</option>" for one in site.models.names)
        parts[f"models_{side}"] = "".join(options)
    gr.HTML(re.sub(r"<!-- (\w+) -->", lambda match: parts[match[1]], template), padding=False)


def as_json(pair: Pair, annotator: str) -> dict[str, Any]:
    """Return a pair as a page gets it: blind, and with everything visible."""
    first = pair.shown_first(annotator)
    return {
        "pair": pair.pair,
        "prompt": [
            {"role": visible(turn["role"], 40), "content": visible(turn["content"], LONGEST)} for turn in pair.prompt
        ],
        "first": visible(getattr(pair, first), LONGEST),
        "second": visible(getattr(pair, OTHER[first]), LONGEST),
    }


def unwritable(error: OSError) -> HTTPException:
    """Return the answer after which a page tries again: nothing was recorded."""
    return HTTPException(507, f"The disk cannot be written to ({error.strerror or error}).")


def routes(site: Site) -> APIRouter:
    """Return what the section asks the server for."""
    poll = Poll(site)
    router = APIRouter(prefix="/prefer", on_shutdown=[poll.close])

    def identify(request: Request, page: Page) -> None:
        """Give a page the name of the login; without one, the name that was typed."""
        name = getattr(request.state, "annotator", None) or page.annotator
        page.annotator = visible(" ".join(name.split()), 80) or "anonymous"

    def answer(page: Page, find: Callable[[], Pair]) -> dict[str, Any]:
        """Return a pair and the state, or why there is no pair."""
        try:
            pair: Any = as_json(find(), page.annotator)
        except UserError as error:
            pair = {"error": visible(str(error), 1000)}
        except OSError as error:
            raise unwritable(error) from None
        return {"pair": pair, "state": poll.state(page.annotator)}

    @router.post("/next")
    def next_pair(request: Request, page: Page, have: str = "") -> dict[str, Any]:
        identify(request, page)
        return answer(page, lambda: poll.next(page, have))

    @router.post("/prompt")
    def typed_prompt(request: Request, typed: Typed) -> dict[str, Any]:
        identify(request, typed)
        return answer(typed, lambda: poll.type(typed))

    @router.post("/vote")
    def vote(request: Request, ballot: Ballot) -> dict[str, Any]:
        identify(request, ballot)
        refused = ""
        try:
            poll.vote(ballot)
        except Conflict as error:
            refused = f"Not counted: {error}."
        except OSError as error:
            raise unwritable(error) from None
        return {**answer(ballot, lambda: poll.next(ballot)), "refused": refused}

    @router.post("/state")
    def state(request: Request, page: Page) -> dict[str, Any]:
        identify(request, page)
        return poll.state(page.annotator)

    @router.post("/votes")
    def own_votes(request: Request, page: Page) -> list[dict[str, Any]]:
        identify(request, page)
        return poll.listed(page.annotator)

    @router.post("/opinions")
    def opinions(request: Request, page: Page, pair: str) -> list[str]:
        identify(request, page)
        return poll.opinions(page.annotator, poll.find(pair))

    return router
