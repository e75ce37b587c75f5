"""What PPO and GRPO compute for one prompt, on the models of a run and with the functions that train them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import get_callable_name

from pipeline.app.models import Loaded
from pipeline.data.arguments import DataArguments
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.evaluation.settings import move
from pipeline.files import read_json
from pipeline.models.generation import Completion, generate
from pipeline.models.loading import avoid_emulation, load_config, load_model, user_error_for
from pipeline.rewards.loading import load_rewards
from pipeline.rl import ppo_math
from pipeline.rl.grpo import TextsAsTheyStand
from pipeline.rl.log_probs import token_log_probs
from pipeline.rl.value_model import VALUE_MODEL_FOLDER, auto_class, token_values

ROWS = 500
"""Prompts of the stage's data that are offered."""


@dataclass(frozen=True)
class Batch:
    """A prompt with its completions, as the trainers have it.

    Attributes:
        ids: (B, L), the prompt followed by each completion, padded on the right.
        attention_mask: (B, L).
        mask: (B, T), 1 for the tokens of the completions.
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor

    def log_probs(self, model: PreTrainedModel, temperature: float) -> Tensor:
        """Return the log-probabilities (B, T) of the completions."""
        length = self.mask.shape[1]
        options: dict[str, Any] = {"entropy": False, "entropy_gradient": False, "autocast": nullcontext}
        found, _ = token_log_probs(
            model, self.ids, self.attention_mask, length, batch_size=None, temperature=temperature, **options
        )
        return found * self.mask


@dataclass(frozen=True)
class TokenView:
    """What PPO sees of the completion, each list by token."""

    tokens: list[int]
    log_probs: list[float]
    kl: list[float]
    rewards: list[float]
    values: list[float]
    advantages: list[float]
    score: float
    penalty: float


def stage_settings(run: Path, stage: str) -> dict[str, Any]:
    """Return the arguments that a stage was trained with, with the paths of the run where it is now."""
    values = read_json(run / stage / "arguments.json")
    if not values:
        raise UserError(Problem("RUN", run / stage, "has no arguments.json, which says how it was trained"))
    return move(values | {"home": str(Path(str(values.get("output_dir", run / stage))).parent)}, run)


def load_rows(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the first prompts that a stage is trained on, with all their columns."""
    given = {item.name: settings[item.name] for item in fields(DataArguments) if settings.get(item.name) is not None}
    split, _ = load_splits(DataArguments(**given | {"max_train_samples": ROWS}), "prompt", evaluation=False)
    return list(islice(split, ROWS))


def sample_group(
    policy: Loaded, prompt: Sequence[int], settings: Mapping[str, Any], number: int, seed: int
) -> tuple[list[Completion], Batch]:
    """Sample `number` completions of a prompt as the trainer does."""
    room = policy.context - len(prompt) if policy.context else settings["max_completion_length"]
    (group,) = generate(
        policy.model,
        policy.tokenizer,
        [prompt],
        max_new_tokens=min(settings["max_completion_length"], room),
        samples=number,
        temperature=settings["temperature"],
        seed=seed,
    )
    # The trainers do not strip what the model wrote.
    group = [replace(c, text=policy.tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in group]
    length = max(len(completion.tokens) for completion in group)
    pad = policy.tokenizer.pad_token_id or 0
    rows = [[*prompt, *c.tokens, *[pad] * (length - len(c.tokens))] for c in group]
    mask = torch.tensor([[1] * len(c.tokens) + [0] * (length - len(c.tokens)) for c in group])
    ids = torch.tensor(rows, device=policy.model.device)
    whole = torch.cat([torch.ones(len(group), len(prompt), dtype=mask.dtype), mask], dim=1)
    return group, Batch(ids, whole.to(ids.device), mask.to(ids.device))


def check(
    settings: Mapping[str, Any],
    prompt: Sequence[Mapping[str, str]],
    group: Sequence[Completion],
    row: Mapping[str, Any],
) -> tuple[dict[str, list[float | None]], list[float]]:
    """Return what each reward function gives each completion, and their weighted sums."""
    functions = load_rewards(settings["reward_funcs"])
    size = len(group)
    columns = {name: [value] * size for name, value in row.items() if name != "prompt"}
    completions = [[{"role": "assistant", "content": completion.text}] for completion in group]
    ids = [completion.tokens for completion in group]
    rewards = {
        get_callable_name(function): function(
            completions=completions, prompts=[list(prompt)] * size, completion_ids=ids, **columns
        )
        for function in functions
    }
    weights = settings.get("reward_weights") or [1.0] * len(functions)
    pairs = list(zip(weights, rewards.values(), strict=True))
    return rewards, [sum(w * (given[i] or 0.0) for w, given in pairs) for i in range(size)]


def group_advantages(rewards: Sequence[float], settings: Mapping[str, Any]) -> Tensor:
    """Return how much better each completion is than its group, as TRL's `GRPOTrainer` computes it."""
    totals = torch.tensor(rewards)
    advantages = totals - totals.mean()
    return advantages if settings.get("scale_rewards") == "none" else advantages / (totals.std() + 1e-4)


def update(policy: Loaded, batch: Batch, advantages: Tensor, settings: Mapping[str, Any]) -> list[float]:
    """Take one optimizer step on a copy of the policy. Returns how many times as likely it made each completion."""
    model = copy.deepcopy(policy.model)
    betas = settings["adam_beta1"], settings["adam_beta2"]
    optimizer = torch.optim.AdamW(model.parameters(), settings["learning_rate"], betas, settings["adam_epsilon"])
    before = batch.log_probs(model, settings["temperature"])
    losses, _ = ppo_math.clipped_policy_loss(
        before - before.detach(), advantages.to(before.device).unsqueeze(1), settings["epsilon"]
    )
    ppo_math.masked_mean(losses, batch.mask).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"] or float("inf"))
    optimizer.step()
    with torch.inference_mode():
        after = batch.log_probs(model, settings["temperature"])
    change: list[float] = (after - before.detach()).sum(1).exp().tolist()
    return change


@torch.inference_mode()
def token_view(
    policy: Loaded,
    reference: Loaded,
    run: Path,
    stage: str,
    settings: Mapping[str, Any],
    prompt: Sequence[Mapping[str, str]],
    completion: Completion,
    batch: Batch,
) -> TokenView:
    """Return what PPO computes for each token of a completion, before advantages are whitened over a rollout."""
    critic = load_critic(run / stage)
    log_probs = batch.log_probs(policy.model, settings["temperature"])
    kl = ppo_math.kl_estimate(log_probs, batch.log_probs(reference.model, settings["temperature"]), "k1") * batch.mask
    values = token_values(critic, batch.ids, batch.attention_mask, batch.mask.shape[1], None, nullcontext) * batch.mask
    conversation = [*map(dict, prompt), {"role": "assistant", "content": completion.text}]
    total = 0.0
    weights = settings.get("reward_weights") or []
    paths = settings.get("reward_model_path") or []
    for weight, path in zip([*weights[: len(paths)], *[1.0] * (len(paths) - len(weights))], paths, strict=True):
        total += weight * score(path, conversation, completion.stopped, settings.get("chat_template_kwargs"))
    penalty = 0.0 if completion.stopped else settings.get("missing_eos_penalty") or 0.0
    rewards = ppo_math.token_rewards(
        torch.tensor([total - penalty], device=kl.device), settings["kl_coef"] * kl, batch.mask
    )
    advantages, _ = ppo_math.generalized_advantages(rewards, values, batch.mask, settings["gamma"], settings["lam"])
    columns = {"log_probs": log_probs, "kl": kl, "rewards": rewards, "values": values, "advantages": advantages}
    lists = {name: column[0].tolist() for name, column in columns.items()}
    return TokenView(completion.tokens, **lists, score=total, penalty=penalty)


def score(
    path: str, conversation: list[dict[str, str]], stopped: bool, template: Mapping[str, Any] | None = None
) -> float:
    """Return a reward model's score of a conversation, whose answer it reads without an end of turn if it has none.

    `template` are further arguments of the chat template, with which the trainer writes the conversation, too.
    """
    model, tokenizer = load_model(path, "reward_model_path", reward=True)
    text = TextsAsTheyStand(tokenizer, [stopped]).apply_chat_template(conversation, tokenize=False, **template or {})
    inputs = tokenizer(text=text, return_tensors="pt", add_special_tokens=False)
    return float(model.eval()(**inputs).logits[0, 0])


def load_critic(folder: Path) -> PreTrainedModel:
    """Load the critic that PPO saved beside the policy."""
    path = str(folder / VALUE_MODEL_FOLDER)
    with user_error_for("RUN", path, "critic"):
        config = load_config(path)
        critic: PreTrainedModel = auto_class(config).from_pretrained(path, config=config, trust_remote_code=False)
        avoid_emulation(critic)
    return critic.eval()
