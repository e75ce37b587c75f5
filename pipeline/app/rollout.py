"""Watch a rollout: what PPO and GRPO see of one prompt, live on the models of the run.

page    POST /rollout      {"stage": "4_grpo", "policy": "3_ppo", "text": "Ana has 7 eggs. ...", ...
server  a line of JSON     {"step": "prompt", ...}, then "completions", "check" and "update" of GRPO,
                           or "completion" and "tokens" of PPO, or {"failed": why}
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from pipeline.app import watch
from pipeline.app.models import Loaded, Values
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
Event = dict[str, Any]
"""A piece of a rollout, which the page adds to the ones that it shows."""


class Asked(BaseModel):
    stage: str
    policy: str
    text: str = Field(min_length=1)
    answer: str = ""
    seed: int = Field(0, ge=0, lt=2**63)


def content(site: Site) -> dict[str, Any]:
    results = load_run(site.run).stages
    stages = []
    for name in reversed(site.models.stages):
        info = stage_info(name)
        if info.watch:
            # The success rate shown next to the prompt: one answer says little about how often answers are right.
            solved = results[name].metrics.get("pass@1") if info.held_out == "problems" and name in results else None
            tally = f"{name} solves {solved.value:.0%} of {solved.n} held-out problems." if solved else ""
            shown_stage = {"name": name, "title": info.title, "key": info.held_out, "tally": tally}
            stages.append({**shown_stage, "policy": before(site, name)})
    return {"stages": stages, "models": site.models.stages}


def routes(site: Site) -> APIRouter:
    router, turns = APIRouter(), CapacityLimiter(1)

    @router.post("/rollout")
    def rollout(asked: Asked) -> StreamingResponse:
        if not {asked.stage, asked.policy} <= set(site.models.stages) or not stage_info(asked.stage).watch:
            raise HTTPException(422, "This page has no such stage or model.")
        return stream(roll_out(site, asked), turns)

    return router


def roll_out(site: Site, asked: Asked) -> Generator[Event]:
    info = stage_info(asked.stage)
    # A held-out prompt comes with the columns by which its rewards are computed.
    found = site.find(asked.text, info.held_out)
    row = dict(found.row) if found else {"prompt": [{"role": "user", "content": asked.text}]}
    row |= {"answer": asked.answer} if asked.answer else {}
    try:
        settings = watch.stage_settings(site.run, asked.stage)
        policy, reference = site.models.get(asked.policy), site.models.get(before(site, asked.stage))
        toolbox = load_toolbox(settings, policy.tokenizer)
        opened = policy.open(row, toolbox, settings.get("chat_template_kwargs") or {})
        messages = toolbox.open(row)[0] if toolbox else row["prompt"]
        text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        facts = [f"{len(opened.prompt)} tokens", *([f"may call {', '.join(opened.tools)}"] if toolbox else [])]
        prompt = {"text": visible(text, SHOWN), "facts": " · ".join(facts)}
        yield {"step": "prompt", "title": "Prompt", "about": info.watch, "completions": [prompt]}
        yield from (ppo if info.has_critic else grpo)(site, asked, settings, policy, reference, row)
    except UserError as error:
        yield {"failed": visible("; ".join(map(str, error.problems)), SHOWN)}
    except (RunStopped, *LIBRARY_ERRORS) as error:
        # A reward function may raise anything; its own error says more than the one that reports the stopped step.
        reason = error.__cause__ or error
        yield {"failed": visible(f"{type(reason).__name__}: {reason}", SHOWN)}


def before(site: Site, stage: str) -> str:
    """Return the stage that `stage` was trained from, which is more instructive to watch, or else `stage`."""
    try:
        name = Path(str(watch.stage_settings(site.run, stage).get("model_name_or_path"))).name
    except UserError:
        return stage
    return name if name in site.models.stages else stage


def grpo(site: Site, asked: Asked, settings: Values, policy: Loaded, reference: Loaded, row: Values) -> Iterator[Event]:
    """Yield GRPO's steps after the prompt as they are computed."""
    group = watch.sample_group(policy, row, settings, settings["num_generations"], asked.seed)
    about = f"{len(group)} attempts of {asked.policy}, sampled at temperature {settings['temperature']:g}."
    completions = [shown(policy, one) for one in group]
    yield {"step": "completions", "title": "Completions", "about": about, "completions": completions}
    seen = watch.update(policy, reference, settings, row, group)
    mean = sum(seen.totals) / len(seen.totals)
    about = f"Mean reward {number(mean, 2)}. {SCALED[str(settings.get('scale_rewards', 'group')).lower()]}"
    if max(seen.totals) == min(seen.totals):
        about += " All are equal here, so nothing is learned from this prompt."
    elif max(seen.totals) > 0:
        about += " A guess that happens to be right earns as much as a solution; over many problems, solutions win."
    lines = [[visible(f"{name}: {number(one, 2)}") for one in column] for name, column in seen.rewards.items()]
    rewards = [" · ".join(of_one) for of_one in zip(*lines, strict=True)]
    advantages = list(map(finite, seen.advantages))
    yield {"step": "check", "title": "Check", "about": about, "rewards": rewards, "advantages": advantages}

    about = "One step on a copy of the model, with only this group and the learning rate of the run "
    about += f"({settings['learning_rate']:g}). A step of the run takes {settings['per_device_train_batch_size']} "
    about += "completions."
    yield {"step": "update", "title": "Update", "about": about, "changes": list(map(finite, seen.changes))}


def ppo(site: Site, asked: Asked, settings: Values, policy: Loaded, reference: Loaded, row: Values) -> Iterator[Event]:
    """Yield the completion, and what PPO computes for each of its tokens."""
    (one,) = watch.sample_group(policy, row, settings, 1, asked.seed)
    about = f"One answer of {asked.policy}."
    yield {"step": "completion", "title": "Completion", "about": about, "completions": [shown(policy, one)]}
    view = watch.token_view(policy, reference, site.run, asked.stage, settings, row, one)
    about = f"Score of the reward model: {number(view.score, 2)}"
    if view.penalty:
        about += f", less {view.penalty:g} because the answer did not end"
    about += f". KL from {reference.name}: {number(sum(filter(None, view.kl)), 2)} nats, each of which costs "
    about += f"{settings['kl_coef']:g}. Value is what the critic, a model that is trained along, expects of the reward "
    about += "still to come. "
    gamma, lam = settings.get("gamma", 1.0), settings.get("lam", 0.95)
    about += "Advantage, from the last token to the first: reward + γ × next value − value + γ × λ × next advantage, "
    about += f"where nothing comes after the last token, γ = {gamma:g} and λ = {lam:g} (GAE). "
    about += update_of(settings)
    if settings.get("reward_normalization", "none") != "none":
        about += " The trainer also normalises the score by those of earlier answers, which is left out here."
    if 0 in one.sampled:
        about += " Text that a tool wrote is not shown, because the model did not choose it."
    columns = {"KL": view.kl, "Reward": view.rewards, "Value": view.values, "Advantage": view.advantages}
    yield {
        "step": "tokens",
        "title": "What PPO sees",
        "about": about,
        "tokens": [visible(str(policy.tokenizer.decode([token]))) for token in view.tokens],
        "chosen": one.sampled,
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


def shown(policy: Loaded, completion: Dialogue) -> dict[str, str]:
    """Return the text of a completion, in turns if there are tools, and how many tokens it has."""
    # The trainers do not strip what the model wrote.
    text = readable(completion.messages) or str(policy.tokenizer.decode(completion.tokens, skip_special_tokens=True))
    own, total = sum(completion.sampled), len(completion.tokens)
    facts = f"{own} tokens" + (f" and {total - own} of tools" if own < total else "")
    ended = "" if watch.has_ended(policy, completion) else ", cut off"
    return {"text": visible(text, SHOWN) or "(nothing)", "facts": facts + ended}
