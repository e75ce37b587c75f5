"""What all sections of the page share: the run that they show, and answers that are sent piece by piece."""

import argparse
import json
from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import StreamingResponse

from pipeline.app.models import Models
from pipeline.app.prompts import HeldOutPrompt, held_out_prompts, loadable_tools

LOADER = PackageLoader("pipeline.app", "static")
TEMPLATES = Environment(loader=LOADER, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
"""The HTML templates in `static/`; values are escaped."""


@dataclass(frozen=True)
class Site:
    """The run that a page shows: its folder, the models to choose from, and the options of the command line."""

    run: Path
    models: Models
    options: argparse.Namespace

    @cached_property
    def prompts(self) -> list[HeldOutPrompt]:
        """The held-out prompts of the run, [] if its data cannot be read."""
        return held_out_prompts(self.run)

    @cached_property
    def called(self) -> dict[str, Any]:
        """The tools that the run's models may call, by the key of the data whose prompts they are meant for."""
        return loadable_tools(self.run)

    def find(self, text: str, key: str = "") -> HeldOutPrompt | None:
        """Return the held-out prompt with this text, optionally from one key only, or None."""
        for prompt in self.prompts:
            if prompt.text == text and key in ("", prompt.key):
                return prompt
        return None

    @property
    def is_private(self) -> bool:
        """Whether only this machine can open the page, so that its visitor is also the one who runs it."""
        return self.options.password is None


def stream(values: Generator[Any], limiter: CapacityLimiter) -> StreamingResponse:
    """Answer a request with a line of JSON for each value, as soon as it is there, until the visitor leaves.

    `limiter` bounds how many answers are computed at once; the others wait for their turn. The generator runs in
    another thread, and is closed at the end.
    """

    async def lines() -> AsyncIterator[str]:
        async with limiter:
            try:
                async for value in iterate_in_threadpool(values):
                    yield json.dumps(value) + "\n"
            finally:
                values.close()

    return StreamingResponse(lines(), media_type="application/x-ndjson")
