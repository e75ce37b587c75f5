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

LONGEST = 1024
"""Maximum number of tokens of an answer that a visitor may ask for."""
USUAL = 128
"""Maximum number of tokens of an answer, unless the visitor asks for another one."""
SHOWN = 20_000
"""Maximum number of characters of an answer that are shown."""
UPDATE_SECONDS = 0.06
"""Seconds between two updates of the page. The eye does not need more than 16 a second."""


class CompareRequest(BaseModel):
    """A prompt, the models to answer it, and how answers are sampled."""

    text: str = Field(min_length=1)
    models: list[str] = Field(max_length=100)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    longest: int = Field(USUAL, ge=1, le=LONGEST)
    seed: int = Field(0, ge=0, lt=2**63)


def content(site: Site) -> dict[str, Any]:
    """Return the variables of this section's template."""
    # The prompts that every stage answered for the report, each once.
    prompts: dict[str, None] = {}
    for stage in load_run(site.run).stages.values():
        for answer in stage.answers:
            prompts[str(answer["prompt"])] = None
    columns = []
    for place, name in enumerate(site.models.names):
        title = ""
        if name in site.models.stages:
            title = stage_info(name).title
        columns.append({"name": name, "title": title, "chosen": place < 6})
    shown_prompts = [visible(text, SHOWN) for text in prompts]
    return {"prompts": shown_prompts, "columns": columns, "usual": USUAL, "longest": LONGEST}


def routes(site: Site) -> APIRouter:
    """Return the route that this section requests."""
    router = APIRouter()
    # At most two visitors share the cores.
    limiter = CapacityLimiter(2)

    @router.post("/compare")
    def compare(request: CompareRequest) -> StreamingResponse:
        return stream(answer_all(site, request), limiter)

    return router


def answer_all(site: Site, request: CompareRequest) -> Generator[list[dict[str, Any]]]:
    """Answer a prompt with several models, which take turns of one token each.

    Yield the columns that have changed (see `column`), as often as `UPDATE_SECONDS` allows.
    """
    sampling = Sampling(request.longest, request.temperature, request.top_k, request.top_p, request.seed)
    # Models that the page does not have are ignored.
    names = [name for name in site.models.names if name in request.models]
    writers = {name: answer_one(site, request.text, name, sampling) for name in names}
    # What the models have written since the last update, and how many tokens of each the page has.
    changes: dict[str, Answer | str] = {}
    tokens_sent = dict.fromkeys(names, 0)
    last_update = 0.0
    while writers:
        for name, writer in list(writers.items()):
            answer = next(writer, None)
            if answer is None:
                del writers[name]
            else:
                changes[name] = answer
        if not writers or time.perf_counter() - last_update > UPDATE_SECONDS:
            yield [column(name, answer, tokens_sent[name]) for name, answer in changes.items()]
            for name, answer in changes.items():
                if isinstance(answer, Answer):
                    tokens_sent[name] = len(answer.tokens)
            changes = {}
            last_update = time.perf_counter()


def answer_one(site: Site, text: str, name: str, sampling: Sampling) -> Iterator[Answer | str]:
    """Yield a model's answer after each of its tokens, or why the model cannot answer."""
    try:
        loaded = site.models.get(name)
        messages = [{"role": "user", "content": text}]
        # With tools, a held-out prompt may come with an environment.
        prompt = None
        if site.called:
            prompt = site.find(text)
        if prompt is not None:
            messages = prompt.messages
        dialogue = open_prompt(loaded, messages, site.called, prompt)
        yield from write(loaded, dialogue.prompt, sampling, dialogue.tools)
    except UserError as error:
        yield "\n".join(map(str, error.problems))
    # The template or the code of one model must not end the answers of the others.
    except (TemplateError, *LIBRARY_ERRORS) as error:
        yield f"{type(error).__name__}: {error}"


def column(name: str, answer: Answer | str, tokens_sent: int) -> dict[str, Any]:
    """Return what the page gets for a model.

    Args:
        name: The model.
        answer: Its answer so far, or why it has none.
        tokens_sent: Number of tokens of the answer that the page has. The text is sent whole, tokens only once.
    """
    if isinstance(answer, str):
        return {"model": name, "failed": visible(answer, SHOWN)}
    tokens = []
    for token in answer.tokens[tokens_sent:]:
        alternatives = [[visible(text), finite(log_prob)] for text, log_prob in token.alternatives]
        tokens.append({"text": visible(token.text), "logProb": finite(token.log_prob), "others": alternatives})
    text = visible(answer.text, SHOWN)
    return {"model": name, "text": text, "seconds": answer.seconds, "stopped": answer.stopped, "tokens": tokens}
