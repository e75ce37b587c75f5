"""Compare: one prompt, and the answers of several models in columns, as they are written.

page    POST /compare      {"text": "What is a fox?", "models": ["0_random", "2_sft"], "temperature": 0, ...}
server  a line of JSON     [{"model": "2_sft", "text": "A fox is", "seconds": 0.02, ...}]
        another one        ... whenever a column has changed, until all have ended or the page closes the connection
"""

import time
from collections.abc import Generator, Iterator
from typing import Any

from anyio import CapacityLimiter
from fastapi import APIRouter
from jinja2 import TemplateError
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from pipeline.app.models import Answer, Sampling, write
from pipeline.app.prompts import open_prompt
from pipeline.app.site import Site, stream
from pipeline.errors import LIBRARY_ERRORS, UserError
from pipeline.evaluation.intervals import finite
from pipeline.report.load import load_run, stage_info
from pipeline.report.text import visible

LONGEST, USUAL = 1024, 128
"""Tokens of an answer: the most that are allowed, and the limit unless the visitor sets another one."""
SHOWN = 20_000
"""Maximum number of characters of an answer that are shown."""


class Asked(BaseModel):
    """A prompt, who is to answer it, and how answers are sampled."""

    text: str = Field(min_length=1)
    models: list[str] = Field(max_length=100)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    longest: int = Field(USUAL, ge=1, le=LONGEST)
    seed: int = Field(0, ge=0, lt=2**63)


def content(site: Site) -> dict[str, Any]:
    # The prompts that every stage was asked for the report.
    asked = [str(item["prompt"]) for stage in load_run(site.run).stages.values() for item in stage.answers]
    columns = []
    for place, name in enumerate(site.models.names):
        title = stage_info(name).title if name in site.models.stages else ""
        columns.append({"name": name, "title": title, "chosen": place < 6})
    prompts = [visible(text, SHOWN) for text in dict.fromkeys(asked)]
    return {"prompts": prompts, "columns": columns, "usual": USUAL, "longest": LONGEST}


def routes(site: Site) -> APIRouter:
    # At most two visitors share the cores; others wait for their turn.
    router, turns = APIRouter(), CapacityLimiter(2)

    @router.post("/compare")
    def compare(asked: Asked) -> StreamingResponse:
        return stream(answer_all(site, asked), turns)

    return router


def answer_all(site: Site, asked: Asked) -> Generator[list[dict[str, Any]]]:
    """Answer a prompt with several models, which take turns of one token each. Yield what has changed."""
    sampling = Sampling(asked.longest, asked.temperature, asked.top_k, asked.top_p, asked.seed)
    names = [name for name in site.models.names if name in asked.models]
    writers = {name: answer_one(site, asked.text, name, sampling) for name in names}
    changed: dict[str, Answer | str] = {}
    sent, latest = dict.fromkeys(names, 0), 0.0
    while writers:
        for name, writer in list(writers.items()):
            found = next(writer, None)
            if found is None:
                del writers[name]
            else:
                changed[name] = found
        # The eye does not need more than 16 updates a second.
        if not writers or time.perf_counter() - latest > 0.06:
            yield [column(name, found, sent[name]) for name, found in changed.items()]
            sent |= {name: len(found.tokens) for name, found in changed.items() if isinstance(found, Answer)}
            changed, latest = {}, time.perf_counter()


def answer_one(site: Site, text: str, name: str, sampling: Sampling) -> Iterator[Answer | str]:
    """Yield a model's answer after each of its tokens, or why the model cannot answer."""
    try:
        loaded = site.models.get(name)
        found = site.find(text) if site.called else None
        messages = found.messages if found else [{"role": "user", "content": text}]
        dialogue = open_prompt(loaded, messages, site.called, found)
        yield from write(loaded, dialogue.prompt, sampling, dialogue.tools)
    except UserError as error:
        yield "\n".join(map(str, error.problems))
    # The template or the code of one model must not end the answers of the others.
    except (TemplateError, *LIBRARY_ERRORS) as error:
        yield f"{type(error).__name__}: {error}"


def column(name: str, found: Answer | str, sent: int) -> dict[str, Any]:
    """Return what the page gets for a model: its answer, of which it already has `sent` tokens, or why it has none."""
    if isinstance(found, str):
        return {"model": name, "failed": visible(found, SHOWN)}
    tokens = []
    for token in found.tokens[sent:]:
        others = [[visible(other), finite(value)] for other, value in token.alternatives]
        tokens.append({"text": visible(token.text), "logProb": finite(token.log_prob), "others": others})
    text = visible(found.text, SHOWN)
    return {"model": name, "text": text, "seconds": found.seconds, "stopped": found.stopped, "tokens": tokens}
