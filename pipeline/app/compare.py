"""Compare: one prompt, and the answers of several models side by side, as they are written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from jinja2 import TemplateError
from markupsafe import Markup, escape

from pipeline.app.models import Answer, Sampling, well_formed, write
from pipeline.app.site import Site
from pipeline.errors import LIBRARY_ERRORS, UserError
from pipeline.report.labels import stage_info
from pipeline.report.load import load_run
from pipeline.report.text import visible

LONGEST = 1024
"""Tokens of an answer, at most."""

USUAL = 128
"""The same, unless the page sets another limit."""

SHOWN = 20_000
"""Characters of an answer that are shown."""

REFRESH = 0.06
"""Seconds between two pictures of the answers."""


def build(site: Site) -> None:
    """Add the section to the page."""
    names = site.models.names
    prompts = report_prompts(site)
    gr.HTML(
        "<h2>Compare</h2><p>One prompt, answered by every stage of the run, from random weights to reasoning. "
        "The models have no memory of earlier prompts.</p>"
    )
    prompt = gr.Textbox(
        label="Prompt", elem_id="prompt-box", lines=2, max_lines=8, value=prompts[0] if prompts else "", autofocus=False
    )
    with gr.Row(elem_classes="buttons"):
        send = gr.Button("Send", elem_id="send", variant="primary")
        stop = gr.Button("Stop", elem_id="stop")
    if prompts:
        gr.Examples([[text] for text in prompts], prompt, label="Prompts of the report", examples_per_page=12)
    with gr.Accordion("Models and sampling", open=False):
        chosen = gr.CheckboxGroup(names, value=names[:6], label="Models", elem_id="models")
        with gr.Row():
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0 always takes the most probable token)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            top_k = gr.Number(0, label="Top-k (0 is off)", precision=0, minimum=0)
            longest = gr.Slider(1, LONGEST, USUAL, step=1, label="Longest answer, in tokens")
            seed = gr.Number(0, label="Seed", precision=0)
    shaded = gr.Checkbox(False, label="Show how probable each token was", elem_id="probabilities")
    with gr.Row(elem_id="answers"):
        columns = [gr.HTML("", elem_classes="column") for _ in names]
    gr.HTML('<p id="inspect" role="status"></p>')

    def answer(
        text: str, asked: list[str], temperature: float, top_p: float, top_k: int, longest: int, seed: int, shade: bool
    ) -> Iterator[list[Any]]:
        sampling = Sampling(int(longest), temperature, int(top_k or 0), top_p, int(seed or 0) % 2**63)
        for shown in answer_all(site, text, [name for name in names if name in asked], sampling, shade):
            # Columns that did not change are not sent again.
            yield [shown.get(name, "" if name not in asked else gr.skip()) for name in names]

    inputs = [prompt, chosen, temperature, top_p, top_k, longest, seed, shaded]
    running = gr.on(
        [send.click, prompt.submit],
        answer,
        inputs,
        columns,
        show_progress="hidden",
        concurrency_limit=2,  # two visitors share the cores; others wait in the queue
        trigger_mode="multiple",  # a page whose server was restarted in the middle of an answer can ask again
        api_visibility="private",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def report_prompts(site: Site) -> list[str]:
    """Return the prompts that every stage was asked for the report."""
    answering = load_run(site.run).answering
    return list(dict.fromkeys(well_formed(str(item["prompt"])) for stage in answering for item in stage.answers))


def answer_all(
    site: Site, text: str, names: Sequence[str], sampling: Sampling, shade: bool
) -> Iterator[dict[str, Markup]]:
    """Answer a prompt with several models, each in its turn for one token.

    Yields:
        The columns that changed, by name.
    """
    yield {name: waiting(name) for name in names}
    latest = 0.0
    changed: dict[str, Answer | Markup] = {}
    answers: dict[str, Iterator[Answer]] = {}

    def shown() -> dict[str, Markup]:
        return {
            name: written(name, found, shade) if isinstance(found, Answer) else found for name, found in changed.items()
        }

    for name in names:
        try:
            loaded = site.models.get(name)
            answers[name] = write(loaded, loaded.encode([{"role": "user", "content": text}]), sampling)
        except UserError as error:
            changed[name] = failed(name, "\n".join(map(str, error.problems)))
        except (TemplateError, *LIBRARY_ERRORS) as error:  # of a model's own code or template
            changed[name] = failed(name, f"{type(error).__name__}: {error}")
    while answers:
        for name, tokens in list(answers.items()):
            try:
                answer = next(tokens)
            except LIBRARY_ERRORS as error:  # one model's failure must not end the others' answers
                changed[name] = failed(name, f"{type(error).__name__}: {error}")
                del answers[name]
                continue
            changed[name] = answer
            if answer.stopped:
                del answers[name]
        if time.perf_counter() - latest > REFRESH:
            yield shown()
            changed, latest = {}, time.perf_counter()
    if changed:
        yield shown()


def title(name: str) -> Markup:
    """Return the heading of a column."""
    about = stage_info(name).title if name[:1].isdigit() else ""
    return Markup("<h3>{} <small>{}</small></h3>").format(visible(name), about)


def waiting(name: str) -> Markup:
    """Return a column before its first token."""
    return title(name) + Markup('<p class="soft">waiting for its first token</p>')


def failed(name: str, message: str) -> Markup:
    """Return a column of a model that cannot answer."""
    return title(name) + Markup('<p class="failed" role="alert">{}</p>').format(visible(message, SHOWN))


def written(name: str, answer: Answer, shade: bool) -> Markup:
    """Return a column with an answer, or with its beginning."""
    text = shaded_tokens(answer) if shade else escape(visible(answer.text, SHOWN))
    count = len(answer.tokens)
    speed = f"{count / answer.seconds:.0f} tokens/s" if answer.seconds > 0 else ""
    facts = [f"{count} token{'s' * (count != 1)}", speed, answer.stopped or "writing"]
    done = ' data-done="1"' if answer.stopped else ""
    return title(name) + Markup(f'<div class="answer"{done}>{{}}</div><p class="soft facts">{{}}</p>').format(
        text, " · ".join(filter(None, facts))
    )


def shaded_tokens(answer: Answer) -> Markup:
    """Return the tokens, coloured by log-probability, each with the alternatives to it."""
    parts = []
    for index, (token, piece) in enumerate(zip(answer.tokens, answer.pieces, strict=True)):
        others = ", ".join(f"{quoted(answer.piece(other))} {share(value)}" for other, value in token.alternatives)
        about = f"{quoted(piece)} {share(token.log_prob)}. Most probable here: {others}"
        level = min(5, int(-token.log_prob / math.log(2)))  # halvings of the probability
        parts.append(
            Markup('<span class="token p{}" tabindex="{}" data-about="{}">{}</span>').format(
                level, -1 if index else 0, about, visible(piece)
            )
        )
    return Markup("").join(parts)


def quoted(piece: str) -> str:
    """Return a token's text so that spaces at its ends show."""
    return f"“{visible(piece)}”"


def share(log_prob: float) -> str:
    """Format a probability."""
    percent = 100 * math.exp(log_prob)
    return f"{percent:.0f}%" if percent >= 1 else "<1%"
