"""What every section of the page works on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from pipeline.app.models import Models

TEMPLATES = Environment(loader=PackageLoader("pipeline.app", "static"), autoescape=True)
"""The HTML in `static/`; whatever is filled in is escaped."""


@dataclass(frozen=True)
class Site:
    """The run that a page shows.

    Attributes:
        run: Its folder.
        models: Its models, and the ones that were named on the command line.
        options: The command line.
    """

    run: Path
    models: Models
    options: argparse.Namespace
