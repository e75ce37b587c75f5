"""Watch a rollout: what PPO and GRPO see of one prompt, live on the models of the run.

page    POST /rollout      {"stage": "4_grpo", "policy": "3_ppo", "text": "Ana has 7 eggs. ...", ...
server  a line of JSON     {"step": "prompt", ...}, then "completions", "check", "update" and "inside" of GRPO,
                           or "completion" and "tokens" of PPO, or {"failed": why}
page    POST /updates      the same, with a "loss" and a number of "updates"
server  a line of JSON     {"step": "inside", ...} of the same completions
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anyio import CapacityLimiter
from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse
from torch import Tensor

from pipeline.app import watch
from pipeline.app.losses import (
    LOSSES,
    explain_divisor,
    explain_first_update,
    explain_ratio,
    explain_term,
    loss_name,
    with_loss,
)
from pipeline.app.models import Loaded, Values
from pipeline.app.prompts import LONGEST_PROMPT
from pipeline.app.site import Site, stream
from pipeline.errors import LIBRARY_ERRORS, RunStopped, UserError
from pipeline.evaluation.intervals import finite
from pipeline.report.load import load_run, stage_info
from pipeline.report.text import number, visible
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.dialogue import Dialogue, readable
from pipeline.tools.loading import load_toolbox

SCALED = {
    "group": "The advantage is the reward less the mean, in standard deviations of the group.",
    "batch": "The advantage is the reward less the mean, in standard deviations of the batch, here this group.",
    "none": "The advantage is the reward less the mean.",
}
"""What the advantages are, by `scale_rewards`."""
SHOWN = 4000
"""Maximum number of characters of a completion that are shown."""
MOST_UPDATES = 4
"""Maximum number of updates with a group of completions that a visitor can ask for."""
Event = dict[str, Any]
"""A piece of a rollout, which the page adds to the ones that it shows."""


class RolloutRequest(BaseModel):
    """What the page asks for: the rollout of a stage, on a prompt, by the model of the stage `policy`.

    `answer` is the reference answer of a prompt that is not among the held-out ones; empty if there is none. For the
    updates of GRPO, `loss` is one of `LOSSES`, or empty for the loss of the stage, and `updates` is their number.
    """

    stage: str
    policy: str
    text: str = Field(min_length=1)
    answer: str = Field("", max_length=LONGEST_PROMPT)
    seed: int = Field(0, ge=0, lt=2**63)
    loss: str = ""
    updates: int = Field(1, ge=1, le=MOST_UPDATES)


def content(site: Site) -> dict[str, Any]:
    """Return what the page shows before anything is sampled: the stages that can be watched, the latest first."""
    results = load_run(site.run).stages
    stages = []
    for name in reversed(site.models.stages):
        info = stage_info(name)
        if not info.watch:
            continue
        # The success rate shown next to the prompt: one answer says little about how often answers are right.
        tally = ""
        if info.held_out == "problems" and name in results:
            pass_at_1 = results[name].metrics.get("pass@1")
            if pass_at_1:
                tally = f"{name} solves {pass_at_1.value:.0%} of {pass_at_1.n} held-out problems."
        stages.append(
            {
                "name": name,
                "title": info.title,
                "key": info.held_out,
                "tally": tally,
                "policy": parent_stage(site, name),
            }
        )
    return {"stages": stages, "models": site.models.stages}


def routes(site: Site) -> APIRouter:
    """Return the routes of the page's rollouts. One is computed at a time, and the next request waits."""
    router, turns = APIRouter(), CapacityLimiter(1)

    def check(request: RolloutRequest) -> None:
        is_known = {request.stage, request.policy} <= set(site.models.stages)
        if not is_known or not stage_info(request.stage).watch or request.loss not in ("", *LOSSES):
            raise HTTPException(422, "This page has no such stage, model or loss.")

    @router.post("/rollout")
    def rollout(request: RolloutRequest) -> StreamingResponse:
        check(request)
        return stream(roll_out(site, request), turns)

    @router.post("/updates")
    def updates(request: RolloutRequest) -> StreamingResponse:
        check(request)
        if stage_info(request.stage).has_critic:
            raise HTTPException(422, "Only the tokens of GRPO have several losses.")
        return stream(roll_out(site, request, again=True), turns)

    return router


def roll_out(site: Site, request: RolloutRequest, again: bool = False) -> Generator[Event]:
    """Yield the pieces of a rollout as they are computed, or why they cannot be.

    `again` is for a page that has the rollout of GRPO already: only the updates are yielded, of the same completions.
    """
    info = stage_info(request.stage)
    # A held-out prompt comes with the columns by which its rewards are computed.
    prompt = site.find(request.text, info.held_out)
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": request.text}]}
    if prompt:
        row = dict(prompt.row)
    if request.answer:
        row["answer"] = request.answer
    try:
        settings = watch.stage_settings(site.run, request.stage)
        policy = site.models.get(request.policy)
        reference = site.models.get(parent_stage(site, request.stage))
        if again:
            group = sample_group(policy, row, settings, request)
            update = watch.update(policy, reference, with_loss(settings, request.loss), row, group, request.updates)
            yield _inside_event(policy, settings, request, group, update)
        else:
            yield _prompt_event(info.watch, policy, settings, row)
            steps = ppo if info.has_critic else grpo
            yield from steps(site, request, settings, policy, reference, row)
    except UserError as error:
        yield {"failed": visible("; ".join(map(str, error.problems)), SHOWN)}
    except (RunStopped, *LIBRARY_ERRORS) as error:
        # A reward function may raise anything; its own error says more than the one that reports the stopped step.
        reason = error.__cause__ or error
        yield {"failed": visible(f"{type(reason).__name__}: {reason}", SHOWN)}


def _prompt_event(about: str, policy: Loaded, settings: Values, row: Values) -> Event:
    """Return the first step: the prompt of a row, as a tool or an environment of the stage completes it."""
    toolbox = load_toolbox(settings, policy.tokenizer)
    dialogue = policy.open(row, toolbox, settings.get("chat_template_kwargs") or {})
    if settings.get("trainer"):
        # To import the trainer is to run code that only a file of the run names.
        about += f" The stage was trained with {settings['trainer']}; a subclass of the trainer shown here."
    facts = [f"{len(dialogue.prompt)} tokens"]
    messages = row["prompt"]
    if toolbox:
        facts.append(f"may call {', '.join(dialogue.tools)}")
        messages, _ = toolbox.open(row)
    text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    completion = {"text": visible(text, SHOWN), "facts": " · ".join(facts)}
    return {"step": "prompt", "title": "Prompt", "about": about, "completions": [completion]}


def parent_stage(site: Site, stage: str) -> str:
    """Return the stage that `stage` was trained from, or `stage` itself if the run does not have it.

    It is more instructive to watch: there is something left to learn.
    """
    try:
        name = Path(str(watch.stage_settings(site.run, stage).get("model_name_or_path"))).name
    except UserError:
        return stage
    return name if name in site.models.stages else stage


def sample_group(policy: Loaded, row: Values, settings: Values, request: RolloutRequest) -> list[Dialogue]:
    """Sample GRPO's completions of the prompt of a row: the same ones for the same request."""
    return watch.sample_group(policy, row, settings, settings["num_generations"], request.seed)


def grpo(
    site: Site, request: RolloutRequest, settings: Values, policy: Loaded, reference: Loaded, row: Values
) -> Iterator[Event]:
    """Yield GRPO's steps after the prompt as they are computed."""
    group = sample_group(policy, row, settings, request)
    about = f"{len(group)} attempts of {request.policy}, sampled at temperature {settings['temperature']:g}."
    completions = [completion_text(policy, completion) for completion in group]
    yield {"step": "completions", "title": "Completions", "about": about, "completions": completions}

    update = watch.update(policy, reference, settings, row, group)
    mean = sum(update.totals) / len(update.totals)
    about = f"Mean reward {number(mean, 2)}. {SCALED[str(settings.get('scale_rewards', 'group')).lower()]}"
    if max(update.totals) == min(update.totals):
        about += " All are equal here, so nothing is learned from this prompt."
    elif max(update.totals) > 0:
        about += " A guess that happens to be right earns as much as a solution; over many problems, solutions win."
    rewards = []
    for index in range(len(group)):
        texts = [visible(f"{name}: {number(column[index], 2)}") for name, column in update.rewards.items()]
        rewards.append(" · ".join(texts))
    advantages = list(map(finite, update.advantages))
    yield {"step": "check", "title": "Check", "about": about, "rewards": rewards, "advantages": advantages}

    about = "One step on a copy of the model, with only this group and the learning rate of the run "
    about += f"({settings['learning_rate']:g}). A step of the run takes {settings['per_device_train_batch_size']} "
    about += "completions."
    yield {"step": "update", "title": "Update", "about": about, "changes": list(map(finite, update.changes))}
    yield _inside_event(policy, settings, request, group, update)


def _inside_event(
    policy: Loaded, settings: Values, request: RolloutRequest, group: Sequence[Dialogue], update: Any
) -> Event:
    """Return what the updates of GRPO do with each token of a group, which `watch.update` has computed."""
    is_learned = update.updates[0].learned
    lengths = [len(completion.tokens) for completion in group]

    def lists(columns: Tensor) -> list[list[float | None]]:
        """Return numbers (completions, tokens) as a list for each completion, None where nothing is learned."""
        values = columns.float().masked_fill(~is_learned, torch.nan).tolist()
        return [[finite(value) for value in row[:length]] for row, length in zip(values, lengths, strict=True)]

    args = update.args
    term, term_words = explain_term(args)
    divisor, divisor_words = explain_divisor(args, len(group), int(is_learned.sum()))
    name = loss_name(settings)
    steps = []
    for step, log_probs, new_log_probs in zip(update.updates, update.log_probs[:-1], update.log_probs[1:], strict=True):
        steps.append(
            {
                "loss": finite(step.loss),
                "logProbs": lists(log_probs),
                "newLogProbs": lists(new_log_probs),
                "ratios": lists(step.ratios),
                "clipped": lists(step.clipped),
                "terms": lists(step.terms),
                "pushes": lists(step.pushes),
            }
        )
    return {
        "step": "inside",
        "title": "Inside the update",
        "loss": request.loss,
        "losses": [["", f"{name}, as in the run"], *([other, other] for other in LOSSES if other != name)],
        "yaml": f"loss_type: {args.loss_type}, importance_sampling_level: {args.importance_sampling_level}",
        "formula": f"{term} ÷ {divisor}",
        "first": explain_first_update(args),
        "words": [["r, the ratio,", explain_ratio(args)], *term_words, [f"÷ {divisor}", divisor_words]],
        "tokens": [[visible(str(policy.tokenizer.decode([token]))) for token in item.tokens] for item in group],
        "advantages": list(map(finite, update.advantages)),
        "updates": steps,
    }


def ppo(
    site: Site, request: RolloutRequest, settings: Values, policy: Loaded, reference: Loaded, row: Values
) -> Iterator[Event]:
    """Yield the completion, and what PPO computes for each of its tokens."""
    (completion,) = watch.sample_group(policy, row, settings, 1, request.seed)
    about = f"One answer of {request.policy}."
    completions = [completion_text(policy, completion)]
    yield {"step": "completion", "title": "Completion", "about": about, "completions": completions}

    view = watch.token_view(policy, reference, site.run, request.stage, settings, row, completion)
    about = f"Score of the reward model: {number(view.score, 2)}"
    if view.penalty:
        about += f", less {view.penalty:g} because the answer did not end"
    kl = sum(value for value in view.kl if value is not None)
    about += f". KL from {reference.name}: {number(kl, 2)} nats, each of which costs "
    about += f"{settings['kl_coef']:g}. Value is what the critic, a model that is trained along, expects of the reward "
    about += "still to come. "
    gamma, lam = settings.get("gamma", 1.0), settings.get("lam", 0.95)
    about += "Advantage, from the last token to the first: reward + γ × next value − value + γ × λ × next advantage, "
    about += f"where nothing comes after the last token, γ = {gamma:g} and λ = {lam:g} (GAE). "
    about += update_of(settings)
    if settings.get("reward_normalization", "none") != "none":
        about += " The trainer also normalises the score by those of earlier answers, which is left out here."
    if 0 in completion.sampled:
        about += " Text that a tool wrote is not shown, because the model did not choose it."
    columns = {"KL": view.kl, "Reward": view.rewards, "Value": view.values, "Advantage": view.advantages}
    yield {
        "step": "tokens",
        "title": "What PPO sees",
        "about": about,
        "tokens": [visible(str(policy.tokenizer.decode([token]))) for token in view.tokens],
        "chosen": completion.sampled,
        "logProbs": list(map(finite, view.log_probs)),
        "columns": {title: list(map(finite, values)) for title, values in columns.items()},
    }


def update_of(settings: Values) -> str:
    """Return which tokens PPO's update makes more likely, by the settings of the stage."""
    if settings.get("whiten_advantages", PPOConfig.whiten_advantages):
        size = settings.get("generation_batch_size")
        rollout = f"the rollout, {size} answers" if size else "the rollout"
        return (
            f"PPO first shifts and scales the advantages to mean 0 and variance 1 over all tokens of {rollout}; its "
            "update then makes tokens above that mean more likely, and those below it less likely. The table is from "
            "before this shift, for one answer has no rollout to compare with: that a number is above or below 0 does "
            "not yet say in which direction the update goes."
        )
    return "PPO's update makes tokens with an advantage above 0 more likely, and the others less likely."


def completion_text(policy: Loaded, completion: Dialogue) -> dict[str, str]:
    """Return the text of a completion, in turns if there are tools, and how many tokens it has."""
    # The trainers do not strip what the model wrote.
    text = readable(completion.messages) or str(policy.tokenizer.decode(completion.tokens, skip_special_tokens=True))
    sampled, total = sum(completion.sampled), len(completion.tokens)
    facts = f"{sampled} tokens"
    if sampled < total:
        facts += f" and {total - sampled} of tools"
    if not watch.has_ended(policy, completion):
        facts += ", cut off"
    return {"text": visible(text, SHOWN) or "(nothing)", "facts": facts}
