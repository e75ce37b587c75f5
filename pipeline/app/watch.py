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
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import Toolbox, load_toolbox
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


class _Replay:
    """A trainer whose rollout is a `group` of dialogues that were sampled before, with the tools of `toolbox`."""

    group: Group
    toolbox: Toolbox | None
    environments: Any

    def _tool_call_loop(self, *_: Any) -> tuple[Any, ...]:
        """Return the dialogues, as TRL's method of this name does."""
        # Rewards may ask the environments, which know what happened.
        if self.toolbox and self.toolbox.environment:
            self.environments = [self.toolbox.environment_of(dialogue.tools) for dialogue in self.group]
        return (
            [dialogue.sampled for dialogue in self.group],
            [dialogue.messages for dialogue in self.group],
            [dialogue.tokens for dialogue in self.group],
            None,
            sum(dialogue.calls for dialogue in self.group),
            sum(dialogue.failures for dialogue in self.group),
            [[] for _ in self.group],
        )


class _ReplayGRPO(_Replay, GRPOTrainer):
    pass


class _ReplayPPO(_Replay, PPOTrainer):
    pass


def stage_settings(run: Path, stage: str) -> dict[str, Any]:
    """Return the arguments that a stage was trained with, with the run's paths updated in case the run was moved."""
    values = read_json(run / stage / "arguments.json")
    if not values:
        raise UserError(Problem("RUN", run / stage, "has no arguments.json, which says how it was trained"))
    home = Path(str(values.get("output_dir", run / stage))).parent
    return relocate(values, home, run)


def sample_group(policy: Loaded, row: Values, settings: Values, number: int, seed: int) -> list[Dialogue]:
    """Sample `number` completions of the prompt of a row as the trainer does, with the tools of the stage."""
    toolbox = load_toolbox(settings, policy.tokenizer)
    template = settings.get("chat_template_kwargs") or {}
    group = [policy.open(row, toolbox, template) for _ in range(number)]
    limit = settings["max_completion_length"]
    turns = settings.get("max_tool_calling_iterations")
    chat = ChatModel(policy.model, policy.tokenizer, limit, toolbox=toolbox, turns=turns)
    chat.conduct(group, template, temperature=settings["temperature"], seed=seed)
    return group


def has_ended(policy: Loaded, completion: Dialogue) -> bool:
    """Return whether a completion ends with an end of turn. Otherwise it was cut off."""
    if not completion.tokens:
        return False
    return completion.tokens[-1] in end_tokens(policy.model, policy.tokenizer)


def update(policy: Loaded, reference: Loaded, settings: Values, row: Values, group: Group) -> SimpleNamespace:
    """Take one optimizer step of GRPO on a copy of the policy that wrote the group of completions of a row's prompt.

    `reference` is the model that the stage started from, for the KL penalty, if `beta` asks for one. Return, for each
    completion, its `rewards` by function (None for no opinion), their weighted sum in `totals`, the `advantages`, and
    in `changes` the factor by which the step changed its probability.
    """
    # A stage with LoRA trained a new adapter, which changes less than all weights would at the same learning rate.
    adapter = ModelConfig(**{item.name: settings[item.name] for item in fields(ModelConfig) if item.name in settings})
    # Without reward functions, only an environment gives a reward.
    functions: list[Any] = []
    if settings["reward_funcs"]:
        functions = load_rewards(settings["reward_funcs"])
    options = {"reward_funcs": functions, "peft_config": get_peft_config(adapter)}
    with _trainer(_ReplayGRPO, policy, settings, row, group, **options) as trainer:
        if settings.get("beta"):
            trainer.beta = trainer.args.beta = settings["beta"]
            trainer.ref_model = frozen_copy(reference.model, trainer.temperature, cast_lm_head_to_fp32=False)
        log_probs = _log_probs(trainer, group)
        trainer.train()
        changes = (_log_probs(trainer, group) - log_probs).exp().tolist()
        table = trainer.all_rewards
        rewards = {}
        for name, column in zip(trainer.reward_func_names, table.T.tolist(), strict=True):
            rewards[name] = [None if math.isnan(reward) else reward for reward in column]
        totals = (table * trainer.reward_weights).nansum(dim=1).tolist()
        advantages = list(trainer._logs["advantages"])
        return SimpleNamespace(rewards=rewards, totals=totals, advantages=advantages, changes=changes)


def token_view(
    policy: Loaded, reference: Loaded, run: Path, stage: str, settings: Values, row: Values, completion: Dialogue
) -> SimpleNamespace:
    """Return what PPO computes for a completion.

    The `score` of the completion, before the `penalty` for a missing end of turn, is a number. The other results are
    lists with an entry for each of its `tokens`, None for one that a tool wrote: `log_probs`, `kl`, `rewards`, `values`
    and `advantages`, before whitening.
    """
    functions, tokenizers, weights = _paying_rewards(settings)
    options = {
        "reward_funcs": functions,
        "reward_processing_classes": tokenizers,
        "value_model": str(run / stage / VALUE_MODEL_FOLDER),
    }
    # A new trainer copies its model as the reference, so it starts with the reference, then gets the policy's weights.
    start = replace(policy, model=reference.model)
    settings = {**settings, "reward_weights": weights}
    # `PPOConfig` rejects a rollout of a single completion, so it is passed twice, and the first result is used.
    with _trainer(_ReplayPPO, start, settings, row, [completion] * 2, **options) as trainer:
        trainer.model.load_state_dict(policy.model.state_dict())
        trainer.model.train()
        batch = trainer._generate_and_score_completions([dict(row)] * 2)
    rewards = trainer.latest_rewards
    kl = torch.zeros_like(rewards.tokens) if rewards.kl is None else rewards.kl
    columns = {
        "log_probs": batch["old_per_token_logps"],
        "kl": kl,
        "rewards": rewards.tokens,
        "values": batch["old_values"],
        "advantages": batch["advantages"],
    }
    # The policy reads what tools wrote, but did not choose it.
    lists = {}
    for name, column in columns.items():
        pairs = zip(column[0].tolist(), completion.sampled, strict=True)
        lists[name] = [value if is_sampled else None for value, is_sampled in pairs]
    score = float(rewards.scores.rewards[0])
    penalty = float(rewards.scores.missing_end[0])
    return SimpleNamespace(tokens=completion.tokens, **lists, score=score, penalty=penalty)


def _paying_rewards(settings: Values) -> tuple[list[Any], list[Any], list[float]]:
    """Load the rewards of PPO that have a weight: models, then functions, each with its tokenizer (or None) and weight.

    Rewards that are only measured may need columns that a prompt of the page does not have.
    """
    rewards: list[tuple[Any, Any]] = []
    for path in settings.get("reward_model_path") or []:
        rewards.append(load_model(path, "reward_model_path", reward=True))
    names = settings.get("reward_funcs")
    if names:
        rewards += [(function, None) for function in load_rewards(names)]
    weights = settings.get("reward_weights") or [1.0] * len(rewards)
    paying = [(*reward, weight) for reward, weight in zip(rewards, weights, strict=True) if weight]
    functions = [function for function, _, _ in paying]
    tokenizers = [tokenizer for _, tokenizer, _ in paying]
    return functions, tokenizers, [weight for _, _, weight in paying]


@contextmanager
def _trainer(kind: Any, loaded: Loaded, settings: Values, row: Values, group: Group, **options: Any) -> Iterator[Any]:
    """Make a trainer of a copy of a model for one step on a prompt, whose completions are given by `group`."""
    prompts = [dialogue.prompt for dialogue in group]
    tokens = [dialogue.tokens for dialogue in group]
    toolbox = load_toolbox(settings, loaded.tokenizer)
    if toolbox:
        options |= {"tools": list(toolbox.tools), "environment_factory": toolbox.environment}
    # Deprecation warnings of the libraries are not for visitors of the page.
    with tempfile.TemporaryDirectory() as folder, unchanged_random_state(), warnings.catch_warnings(action="ignore"):
        # A new adapter gets random weights.
        set_seed(settings.get("seed", 0))
        trainer = kind(
            # The weights that an adapter was merged into are frozen.
            model=copy.deepcopy(loaded.model).requires_grad_(True),
            args=_config(kind, settings, folder, len(group), loaded.model.device),
            train_dataset=Dataset.from_list([dict(row)] * len(group)),
            # A copy, because TRL may give it a padding token.
            processing_class=copy.deepcopy(loaded.tokenizer),
            rollout_func=lambda *_: {"prompt_ids": prompts, "completion_ids": tokens, "logprobs": None},
            **options,
        )
        trainer.group = group
        trainer.toolbox = toolbox
        trainer.remove_callback(PrinterCallback)
        yield trainer


def _config(kind: Any, settings: Values, folder: str, number: int, device: torch.device) -> GRPOConfig:
    """Return the configuration of a step on `number` completions of a prompt, with the settings of the stage.

    Settings that today's configuration does not have any more, from a run of another release, are ignored.
    """
    config = PPOConfig if issubclass(kind, PPOTrainer) else GRPOConfig
    of_step: dict[str, Any] = {
        "beta": 0.0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "num_generations": number,
        "num_iterations": 1,
        "per_device_train_batch_size": number,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if config is PPOConfig:
        of_step["whiten_advantages"] = False
    of_transformers = {item.name for item in fields(TrainingArguments)}
    for item in fields(config):
        name = item.name
        if name not in settings or name in of_step or name in SWITCHED_OFF or name.startswith("vllm_"):
            continue
        if name not in of_transformers or name.startswith(OPTIMIZER):
            of_step[name] = settings[name]
    return config(output_dir=folder, **of_step)


@torch.no_grad()
def _log_probs(trainer: Any, group: Group) -> Tensor:
    """Return the log-probability of what the policy chose in each completion, under the trainer's policy."""
    device = trainer.accelerator.device

    def padded(rows: list[list[int]], side: str = "right") -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_side=side).to(device)

    prompts = [dialogue.prompt for dialogue in group]
    completions = [dialogue.tokens for dialogue in group]
    ids = torch.cat([padded(prompts, "left"), padded(completions)], dim=1)
    prompt_mask = padded([[1] * len(prompt) for prompt in prompts], "left")
    completion_mask = padded([[1] * len(completion) for completion in completions])
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    chosen = padded([dialogue.sampled for dialogue in group])
    trainer.model.eval()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, chosen.shape[1])
    return (logps * chosen).sum(dim=1)
