"""What PPO and GRPO compute for one prompt: the stage's own trainer, on copies of the models of a run.

The page samples the completions itself. Everything after that is the trainer's: rewards, advantages, loss and optimizer
step, under the settings that the stage was trained with (`arguments.json`). Only what needs more than one prompt is
switched off: normalisation over a rollout, accumulation of gradients, schedules.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainingArguments, set_seed
from trl import GRPOConfig, ModelConfig, get_peft_config

from pipeline.app.models import Loaded, Values
from pipeline.errors import Problem, UserError
from pipeline.files import read_json, relocate
from pipeline.models.generation import end_tokens
from pipeline.models.loading import load_model
from pipeline.rewards.loading import load_rewards
from pipeline.rl import ppo_math
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import load_toolbox
from pipeline.training.frozen_weights import frozen_copy
from pipeline.training.reliable import unchanged_random_state

OPTIMIZER = ("learning_rate", "weight_decay", "adam_", "max_grad_norm", "optim")
"""Prefixes of the transformers options that affect the step. All of TRL's and PPO's do, except for `SWITCHED_OFF`."""
SWITCHED_OFF = (
    "use_vllm", "use_transformers_continuous_batching", "generation_batch_size", "steps_per_generation",
    "num_generations_eval", "model_init_kwargs", "sync_ref_model", "log_completions", "log_completions_hub_repo",
    "reward_normalization", "value_warmup_steps", "frozen_dtype",
)  # fmt: skip

Group = Sequence[Dialogue]
"""Attempts at one prompt. Without tools, each is a single turn that is not parsed into messages."""


def stage_settings(run: Path, stage: str) -> dict[str, Any]:
    """Return the arguments that a stage was trained with, with the run's paths updated in case the run was moved."""
    values = read_json(run / stage / "arguments.json")
    if not values:
        raise UserError(Problem("RUN", run / stage, "has no arguments.json, which says how it was trained"))
    home = Path(str(values.get("output_dir", run / stage))).parent
    return relocate(values, home, run)


def sample_group(policy: Loaded, row: Values, settings: Values, number: int, seed: int) -> list[Dialogue]:
    """Sample `number` completions of the prompt of a row as the trainer does, with the tools of the stage."""
    toolbox, template = load_toolbox(settings, policy.tokenizer), settings.get("chat_template_kwargs") or {}
    group = [policy.open(row, toolbox, template) for _ in range(number)]
    limit, turns = settings["max_completion_length"], settings.get("max_tool_calling_iterations")
    chat = ChatModel(policy.model, policy.tokenizer, limit, toolbox=toolbox, turns=turns)
    chat.conduct(group, template, temperature=settings["temperature"], seed=seed)
    return group


def has_ended(policy: Loaded, completion: Dialogue) -> bool:
    return completion.tokens[-1:] != [] and completion.tokens[-1] in end_tokens(policy.model, policy.tokenizer)


def update(policy: Loaded, reference: Loaded, settings: Values, row: Values, group: Group) -> SimpleNamespace:
    """Take one optimizer step of GRPO on a copy of the policy that wrote the group of completions of a row's prompt.

    `reference` is the model that the stage started from, for the KL penalty, if `beta` asks for one. Return, for each
    completion, its `rewards` by function (None for no opinion), their weighted sum in `totals`, the `advantages`, and
    in `changes` the factor by which the step changed its probability.
    """
    # A stage with LoRA trained a new adapter, which changes less than all weights would at the same learning rate.
    adapter = ModelConfig(**{item.name: settings[item.name] for item in fields(ModelConfig) if item.name in settings})
    # Without reward functions, only an environment gives a reward.
    functions = load_rewards(names) if (names := settings["reward_funcs"]) else []
    options = {"reward_funcs": functions, "peft_config": get_peft_config(adapter)}
    with _trainer(GRPOTrainer, policy, settings, row, group, **options) as trainer:
        if settings.get("beta"):
            trainer.beta = trainer.args.beta = settings["beta"]
            trainer.ref_model = frozen_copy(reference.model, trainer.temperature, cast_lm_head_to_fp32=False)
        before = _log_probs(trainer, group)
        trainer.train()
        changes = (_log_probs(trainer, group) - before).exp().tolist()
        table = trainer.all_rewards
        columns = [[None if math.isnan(reward) else reward for reward in column] for column in table.T.tolist()]
        rewards = dict(zip(trainer.reward_func_names, columns, strict=True))
        totals = (table * trainer.reward_weights).nansum(dim=1).tolist()
        advantages = list(trainer._logs["advantages"])
        return SimpleNamespace(rewards=rewards, totals=totals, advantages=advantages, changes=changes)


def token_view(
    policy: Loaded, reference: Loaded, run: Path, stage: str, settings: Values, row: Values, completion: Dialogue
) -> SimpleNamespace:
    """Return what PPO computes for each token of a completion; None for those that a tool wrote."""
    paths = settings.get("reward_model_path") or []
    rewards: list[tuple[Any, Any]] = [load_model(path, "reward_model_path", reward=True) for path in paths]
    if names := settings.get("reward_funcs"):
        rewards += [(function, None) for function in load_rewards(names)]
    weights = settings.get("reward_weights") or [1.0] * len(rewards)
    # Rewards that are only measured may need columns that a prompt of the page does not have.
    trained = [(*reward, weight) for reward, weight in zip(rewards, weights, strict=True) if weight]
    functions, tokenizers, weights = ([one[part] for one in trained] for part in range(3))
    chosen, critic = {**settings, "reward_weights": weights}, str(run / stage / VALUE_MODEL_FOLDER)
    options = {"reward_funcs": functions, "reward_processing_classes": tokenizers, "value_model": critic}
    # PPO compares every completion with the policy as it was when the trainer was made. A rollout has two of them.
    start = replace(policy, model=reference.model)
    with _trainer(PPOTrainer, start, chosen, row, [completion] * 2, **options) as trainer, torch.no_grad():
        trainer.model.load_state_dict(policy.model.state_dict())
        trainer.model.train()
        batch = trainer._generate_and_score_completions([dict(row)] * 2)
        # Text of tools is read, but the policy did not choose it.
        mask, logps = batch["completion_mask"] * batch.get("tool_mask", 1), batch["old_per_token_logps"]
        kl = torch.zeros_like(logps)
        if trainer.args.kl_coef > 0:
            kl = ppo_math.kl_estimate(logps, batch["ref_per_token_logps"], "k1") * mask
        score = float((trainer.all_rewards[0] * trainer.reward_weights).nansum())
        penalty = 0.0 if has_ended(policy, completion) else settings.get("missing_eos_penalty") or 0.0
        scores = torch.full((len(kl),), score - penalty, device=kl.device)
        token_rewards = ppo_math.token_rewards(scores, trainer.args.kl_coef * kl, mask)
        columns = {"log_probs": logps, "kl": kl, "rewards": token_rewards, "values": batch["old_values"]}
        lists = {
            name: [value if own else None for value, own in zip(column[0].tolist(), completion.sampled, strict=True)]
            for name, column in {**columns, "advantages": batch["advantages"]}.items()
        }
    return SimpleNamespace(tokens=completion.tokens, **lists, score=score, penalty=penalty)


@contextmanager
def _trainer(kind: Any, loaded: Loaded, settings: Values, row: Values, group: Group, **options: Any) -> Iterator[Any]:
    """Make a trainer of a copy of a model for one step on a prompt, whose completions are given."""
    config = PPOConfig if kind is PPOTrainer else GRPOConfig
    unread = {item.name for item in fields(TrainingArguments) if not item.name.startswith(OPTIMIZER)}
    names = {item.name for item in fields(config)} - unread - set(SWITCHED_OFF)
    kept = {name: settings[name] for name in names if name in settings and not name.startswith("vllm_")}
    fixed: dict[str, Any] = {"beta": 0.0, "max_steps": 1, "lr_scheduler_type": "constant", "bf16": False}
    fixed |= {"num_generations": len(group), "num_iterations": 1, "per_device_train_batch_size": len(group)}
    fixed |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    fixed |= {"use_cpu": loaded.model.device.type == "cpu"}
    fixed |= {"whiten_advantages": False} if kind is PPOTrainer else {}
    prompts, tokens = [one.prompt for one in group], [one.tokens for one in group]
    toolbox = load_toolbox(settings, loaded.tokenizer)
    called = {"tools": list(toolbox.tools), "environment_factory": toolbox.environment} if toolbox else {}

    class Shown(kind):  # type: ignore[valid-type, misc]
        """The trainer, with the given dialogues in place of new samples."""

        def _tool_call_loop(self, *_: Any) -> tuple[Any, ...]:
            # Rewards may ask the environments, which know what happened.
            if toolbox and toolbox.environment:
                self.environments = [toolbox.environment_of(one.tools) for one in group]
            messages = [one.messages for one in group]
            counts = sum(one.calls for one in group), sum(one.failures for one in group)
            return [one.sampled for one in group], messages, tokens, None, *counts, [[] for _ in group]

    # Deprecation warnings of the libraries are not for visitors of the page.
    with tempfile.TemporaryDirectory() as folder, unchanged_random_state(), warnings.catch_warnings(action="ignore"):
        # A new adapter gets random weights.
        set_seed(settings.get("seed", 0))
        # The weights that an adapter was merged into are frozen.
        trainer = Shown(
            model=copy.deepcopy(loaded.model).requires_grad_(True),
            args=config(**kept | fixed, output_dir=folder),
            train_dataset=Dataset.from_list([dict(row)] * len(group)),
            # A copy, because TRL may give it a padding token.
            processing_class=copy.deepcopy(loaded.tokenizer),
            rollout_func=lambda *_: {"prompt_ids": prompts, "completion_ids": tokens, "logprobs": None},
            **called,
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer


@torch.no_grad()
def _log_probs(trainer: Any, group: Group) -> Tensor:
    """Return the log-probability of what the policy chose in each completion, under the trainer's policy."""

    def padded(rows: list[list[int]], side: str = "right") -> Tensor:
        rows_of_ids = list(map(torch.tensor, rows))
        return pad_sequence(rows_of_ids, batch_first=True, padding_side=side).to(trainer.accelerator.device)

    prompts, completions = [one.prompt for one in group], [one.tokens for one in group]
    exists = [[[1] * len(row) for row in rows] for rows in (prompts, completions)]
    ids = torch.cat([padded(prompts, "left"), padded(completions)], dim=1)
    mask = torch.cat([padded(exists[0], "left"), padded(exists[1])], dim=1)
    chosen = padded([one.sampled for one in group])
    trainer.model.eval()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, chosen.shape[1])
    return (logps * chosen).sum(dim=1)
