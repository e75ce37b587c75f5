"""Compare: one prompt, and the answers of several models in columns, as they are written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
from jinja2 import TemplateError
from markupsafe import Markup

from pipeline.app.models import Answer, Sampling, well_formed, write
from pipeline.app.site import TEMPLATES, Site
from pipeline.errors import LIBRARY_ERRORS, UserError
from pipeline.report.load import load_run
from pipeline.report.stage_order import stage_info
from pipeline.report.text import visible

LONGEST = 1024
"""Tokens of an answer, at most."""

USUAL = 128
"""Tokens of an answer, unless the visitor sets another limit."""

SHOWN = 20_000
"""Characters of an answer that are shown."""

REFRESH = 0.06
"""Seconds between two updates of the columns."""


def build(site: Site) -> None:
    """Add the section to the page."""
    names = site.models.names
    # The prompts that every stage was asked for the report.
    asked = [item["prompt"] for stage in load_run(site.run).answering for item in stage.answers]
    prompts = list(dict.fromkeys(well_formed(str(prompt)) for prompt in asked))
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

    # Two visitors share the cores, and others wait in the queue. With "multiple", a page whose server was restarted in
    # the middle of an answer can ask again.
    running = gr.on(
        [send.click, prompt.submit],
        answer,
        [prompt, chosen, temperature, top_p, top_k, longest, seed, shaded],
        columns,
        show_progress="hidden",
        concurrency_limit=2,
        trigger_mode="multiple",
        api_visibility="private",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def answer_all(
    site: Site, text: str, names: Sequence[str], sampling: Sampling, shade: bool
) -> Iterator[dict[str, Markup]]:
    """Answer a prompt with several models, which take turns and write one token in each.

    Yields:
        The columns that changed, by name.
    """
    # A model may have to be loaded first, which takes a while.
    yield {name: column(name) for name in names}
    writers = {name: answer_one(site, text, name, sampling) for name in names}
    changed: dict[str, Answer | str] = {}
    latest = 0.0
    while writers:
        for name, writer in list(writers.items()):
            found = next(writer, None)
            if found is None:
                del writers[name]
            else:
                changed[name] = found
        if not writers or time.perf_counter() - latest > REFRESH:
            yield {name: column(name, found, shade) for name, found in changed.items()}
            changed, latest = {}, time.perf_counter()


def answer_one(site: Site, text: str, name: str, sampling: Sampling) -> Iterator[Answer | str]:
    """Yield a model's answer after each of its tokens, or why the model cannot answer."""
    try:
        loaded = site.models.get(name)
        yield from write(loaded, loaded.encode([{"role": "user", "content": text}]), sampling)
    except UserError as error:
        yield "\n".join(map(str, error.problems))
    # The template or the code of one model must not end the answers of the others.
    except (TemplateError, *LIBRARY_ERRORS) as error:
        yield f"{type(error).__name__}: {error}"


def column(name: str, found: Answer | str = "", shade: bool = False) -> Markup:
    """Return the column of a model.

    Args:
        name: The model.
        found: Its answer or the beginning of it, or why it cannot answer. Default: it has not begun.
        shade: Whether the colour of a token shows how probable it was.
    """
    title = stage_info(name).title if name[:1].isdigit() else ""
    values: dict[str, Any] = {"name": visible(name), "title": title}
    if isinstance(found, str):
        values["failed"] = visible(found, SHOWN)
    else:
        count = len(found.tokens)
        speed = [f"{count / found.seconds:.0f} tokens/s"] if found.seconds > 0 else []
        values["facts"] = [f"{count} token{'s' * (count != 1)}", *speed, found.stopped or "writing"]
        values["done"] = bool(found.stopped)
        values["tokens"] = shaded_tokens(found) if shade else []
        values["text"] = visible(found.text, SHOWN)
    return Markup(TEMPLATES.get_template("answer.html.jinja").render(values))


def shaded_tokens(answer: Answer) -> list[dict[str, Any]]:
    """Return the text of each token, its shade, and a sentence about it and its alternatives."""
    shown = []
    for token, piece, alternatives in zip(answer.tokens, answer.pieces, answer.alternatives, strict=True):
        others = ", ".join(f"{quoted(other)} {share(value)}" for other, value in alternatives)
        # From 0 for a certain token, one more for each halving of the probability.
        level = min(5, int(-token.log_prob / math.log(2)))
        about = f"{quoted(piece)} {share(token.log_prob)}. Most probable here: {others}"
        shown.append({"text": visible(piece), "level": level, "about": about})
    return shown


def quoted(piece: str) -> str:
    """Return a token's text so that spaces at its ends show."""
    return f"“{visible(piece)}”"


def share(log_prob: float) -> str:
    """Format a probability."""
    percent = 100 * math.exp(log_prob)
    return f"{percent:.0f}%" if percent >= 1 else "<1%"
