"""Watch a rollout: what PPO and GRPO see of one prompt, live on the models of the run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from pipeline.app import watch
from pipeline.app.compare import quoted, share
from pipeline.app.models import Loaded, well_formed
from pipeline.app.site import TEMPLATES, Site
from pipeline.errors import LIBRARY_ERRORS, RunStopped, UserError
from pipeline.models.generation import Completion
from pipeline.report.load import load_run
from pipeline.report.stage_order import stage_info
from pipeline.report.text import number, signed, visible

SCALED = {
    "group": "The advantage is the reward less the mean, in standard deviations of the group.",
    "batch": "The advantage is the reward less the mean, in standard deviations of the batch, here this group.",
    "none": "The advantage is the reward less the mean.",
}
"""What the advantages are, by `scale_rewards`."""

SHOWN = 4000
"""Characters of a completion that are shown."""


def build(site: Site) -> None:
    """Add the section to the page."""
    stages = [name for name in site.models.stages if stage_info(name).watch]
    gr.HTML("<h2>Watch a rollout</h2>")
    if not stages:
        gr.HTML("<p>The run has neither a PPO nor a GRPO stage.</p>")
        return
    first = stages[-1]
    # The page begins with the first problem whose answers the report shows.
    traces = [trace for stage in load_run(site.run).stages.values() for trace in stage.traces][:1]
    text, answer = (
        (well_formed(str(traces[0].get(key) or "")) for key in ("problem", "reference")) if traces else ("", "")
    )
    stage = gr.Radio([(stage_info(name).title, name) for name in stages], value=first, label="What to watch")
    with gr.Row():
        policy = gr.Dropdown(site.models.stages, value=before(site, first), label="The model that answers")
        seed = gr.Number(0, label="Seed", precision=0)
    prompt = gr.Textbox(text, label="Prompt", lines=2, max_lines=8, elem_id="rollout-prompt")
    reference = gr.Textbox(answer, label="Right result, for the check", elem_id="rollout-answer")
    with gr.Row(elem_classes="buttons"):
        go = gr.Button("Roll out", variant="primary", elem_id="rollout-go")
        another = gr.Button("Prompt from the data", elem_id="rollout-another")
    shown = gr.HTML("", elem_id="rollout-shown")

    # Reading the data of a stage takes seconds.
    @cache
    def rows(stage: str) -> list[dict[str, Any]]:
        try:
            return watch.load_rows(watch.stage_settings(site.run, stage))
        except UserError as error:
            print(error, flush=True)
            return []

    def choose(stage: str) -> tuple[Any, Any]:
        if stage_info(stage).has_critic:
            return stage, gr.update(visible=False)
        return before(site, stage), gr.update(visible=True)

    def take(stage: str) -> tuple[Any, Any]:
        if not rows(stage):
            gr.Warning("The data of this stage cannot be read; the terminal of the server says why.")
            return gr.skip(), gr.skip()
        row = random.choice(rows(stage))
        return well_formed(row["prompt"][-1]["content"]), well_formed(str(row.get("answer") or ""))

    def roll_out(stage: str, policy: str, text: str, answer: str, seed: int) -> Iterator[Markup]:
        # A prompt from the data comes with the columns by which its rewards are computed.
        row = next((dict(row) for row in rows(stage) if row["prompt"][-1]["content"] == text), {})
        messages = row.setdefault("prompt", [{"role": "user", "content": text}])
        row |= {"answer": answer} if answer else {}
        steps = ppo if stage_info(stage).has_critic else grpo
        parts: list[Markup] = []
        try:
            settings = watch.stage_settings(site.run, stage)
            for part in steps(site, stage, policy, settings, messages, row, int(seed or 0) % 2**63):
                parts = part
                yield Markup("").join(parts)
        except UserError as error:
            yield Markup("").join([*parts, failed("; ".join(map(str, error.problems)))])
        except (RunStopped, *LIBRARY_ERRORS) as error:
            # A reward function may raise anything; what it raised says more here than which step it stopped.
            reason = error.__cause__ or error
            yield Markup("").join([*parts, failed(f"{type(reason).__name__}: {reason}")])

    options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": 1, "trigger_mode": "multiple"}
    stage.change(choose, stage, [policy, reference], **options)
    another.click(take, stage, [prompt, reference], **options)
    go.click(roll_out, [stage, policy, prompt, reference, seed], shown, show_progress="hidden", **options)


def before(site: Site, stage: str) -> str:
    """Return the stage that another one was trained from, which is the more instructive to watch."""
    try:
        name = Path(str(watch.stage_settings(site.run, stage).get("model_name_or_path"))).name
    except UserError:
        return stage
    return name if name in site.models.stages else stage


def grpo(
    site: Site,
    stage: str,
    policy: str,
    settings: dict[str, Any],
    messages: Sequence[dict[str, str]],
    row: dict[str, Any],
    seed: int,
) -> Iterator[list[Markup]]:
    """Yield GRPO's four steps as they are made: all parts so far."""
    loaded, reference = site.models.get(policy), site.models.get(before(site, stage))
    ids = loaded.encode(messages, settings.get("chat_template_kwargs") or {})
    parts = [prompt_part(stage, messages, ids)]
    yield parts
    group = watch.sample_group(loaded, ids, settings, settings["num_generations"], seed)
    about = f"{len(group)} attempts of {policy}, sampled at temperature {settings['temperature']:g}."
    parts.append(group_part(2, "Completions", about, group, []))
    yield parts
    seen = watch.update(loaded, reference, settings, row, ids, group)
    advantages = [f"advantage: {signed(advantage, 2)}" for advantage in seen.advantages]
    facts = []
    for i, advantage in enumerate(advantages):
        given = [f"{name}: {number(rewards[i], 2)}" for name, rewards in seen.rewards.items()]
        facts.append([*given, advantage])
    mean = sum(seen.totals) / len(seen.totals)
    about = f"Mean reward {number(mean, 2)}. {SCALED[str(settings.get('scale_rewards', 'group')).lower()]}"
    if max(seen.totals) == min(seen.totals):
        about += " All are equal here, so that nothing is learned from this prompt."
    parts.append(group_part(3, "Check", about, group, facts, seen.totals))
    yield parts
    lines = [
        [f"{change:.2f} times as likely", advantage] for change, advantage in zip(seen.changes, advantages, strict=True)
    ]
    about = (
        f"One step on a copy of the model, with this group alone and the learning rate of the run "
        f"({settings['learning_rate']:g}). A step of the run takes {settings['per_device_train_batch_size']} "
        "completions."
    )
    yield [*parts, group_part(4, "Update", about, group, lines, [change - 1 for change in seen.changes])]


def ppo(
    site: Site,
    stage: str,
    policy: str,
    settings: dict[str, Any],
    messages: Sequence[dict[str, str]],
    row: dict[str, Any],
    seed: int,
) -> Iterator[list[Markup]]:
    """Yield the prompt, the completion, and what PPO computes for each of its tokens: all parts so far."""
    loaded = site.models.get(policy)
    reference = site.models.get(before(site, stage))
    ids = loaded.encode(messages, settings.get("chat_template_kwargs") or {})
    parts = [prompt_part(stage, messages, ids)]
    yield parts
    group = watch.sample_group(loaded, ids, settings, 1, seed)
    parts.append(group_part(2, "Completion", f"One answer of {policy}.", group, []))
    yield parts
    view = watch.token_view(loaded, reference, site.run, stage, settings, row, ids, group[0])
    yield [*parts, token_part(loaded, reference.name, settings, view)]


def prompt_part(stage: str, messages: Sequence[dict[str, str]], ids: Sequence[int]) -> Markup:
    """Return step 1."""
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return part(1, "Prompt", stage_info(stage).watch, prompt=visible(text, SHOWN), facts=f"{len(ids)} tokens")


def group_part(
    place: int,
    title: str,
    about: str,
    group: Sequence[Completion],
    facts: Sequence[Sequence[str]],
    marks: Sequence[float] = (),
) -> Markup:
    """Return a step that shows the completions of a group.

    Args:
        place: Number of the step.
        title: Its name.
        about: What it shows.
        group: The completions.
        facts: What is said about each completion. By default, how many tokens it has.
        marks: A number for each completion. Its colour shows whether it is above or below their mean.
    """
    mean = sum(marks) / len(marks) if marks else 0.0
    completions = []
    for i, completion in enumerate(group):
        mark = marks[i] - mean if marks else 0.0
        lines = facts[i] if facts else [f"{len(completion.tokens)} tokens{'' if completion.stopped else ', cut off'}"]
        completions.append(
            {
                "css": "up" if mark > 1e-6 else "down" if mark < -1e-6 else "",
                "text": visible(completion.text, SHOWN) or "(nothing)",
                "facts": " · ".join(map(visible, lines)),
            }
        )
    return part(place, title, about, completions=completions)


def token_part(policy: Loaded, reference: str, settings: dict[str, Any], view: watch.TokenView) -> Markup:
    """Return the table of tokens."""
    about = (
        f"Score of the reward model: {number(view.score, 2)}"
        + (f", less {view.penalty:g} because the answer did not end" if view.penalty else "")
        + f". KL from {reference}: {number(sum(view.kl), 2)} nats, each of which costs {settings['kl_coef']:g}."
    )
    # The larger an advantage, the stronger its colour; the largest of the answer has half of the full strength.
    top = max(map(abs, view.advantages), default=0.0) or 1.0
    tokens = []
    columns = zip(view.tokens, view.log_probs, view.kl, view.rewards, view.values, view.advantages, strict=True)
    for token, log_prob, *figures in columns:
        tokens.append(
            {
                "css": "up" if figures[-1] > 0 else "down",
                "strength": round(100 * abs(figures[-1]) / top / 2),
                "text": quoted(str(policy.tokenizer.decode([token]))),
                "cells": [share(log_prob), *(signed(figure, 2) for figure in figures)],
            }
        )
    return part(3, "What PPO sees", about, tokens=tokens)


def part(place: int, title: str, about: str, **content: Any) -> Markup:
    """Return the HTML of a step, with the content that `rollout.html.jinja` names."""
    template = TEMPLATES.get_template("rollout.html.jinja")
    return Markup(template.render(place=place, title=title, about=visible(about, SHOWN), **content))


def failed(message: str) -> Markup:
    """Return what is shown in place of a step that failed."""
    return Markup('<p class="failed" role="alert">{}</p>').format(visible(message, SHOWN))
