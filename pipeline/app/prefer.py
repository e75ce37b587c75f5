"""Prefer: which of two answers is better?"""

from __future__ import annotations

import gradio as gr
from fastapi import APIRouter

from pipeline.app.site import Site


def build(site: Site) -> None:
    """Add the section to the page."""
    gr.HTML("<h2>Prefer</h2>")


def routes(site: Site) -> APIRouter:
    """Return what the section asks the server for."""
    return APIRouter(prefix="/prefer")
