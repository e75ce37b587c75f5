"""What PPO and GRPO compute for one prompt: the stage's own trainer, on copies of the models of a run.

The page samples the completions itself, with the seed that it shows. Everything after that is the trainer's: rewards,
advantages, loss and optimizer step, under the settings that the stage was trained with (`arguments.json`). Only what
needs more than one prompt is switched off: normalisation over a rollout, accumulation of gradients, schedules.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainingArguments, set_seed
from trl import GRPOConfig, ModelConfig, get_peft_config

from pipeline.app.models import Loaded
from pipeline.errors import Problem, UserError
from pipeline.evaluation.evaluate_yaml import move
from pipeline.files import read_json
from pipeline.models.generation import Completion, generate
from pipeline.models.loading import load_model
from pipeline.rewards.loading import load_rewards
from pipeline.rl import ppo_math
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.reference_model import frozen_copy
from pipeline.training.reliable import unchanged_random_state

OPTIMIZER = ("learning_rate", "weight_decay", "adam_", "max_grad_norm", "optim")
"""How the options of transformers begin that the step depends on. All of TRL and PPO count, but for `SWITCHED_OFF`."""

SWITCHED_OFF = (
    "use_vllm", "use_transformers_continuous_batching", "generation_batch_size", "steps_per_generation",
    "num_generations_eval", "model_init_kwargs", "sync_ref_model", "log_completions", "log_completions_hub_repo",
    "reward_normalization", "value_warmup_steps", "frozen_dtype",
)  # fmt: skip

Values = Mapping[str, Any]
Tokens = Sequence[int]
Group = Sequence[Completion]


@dataclass(frozen=True)
class Update:
    """What GRPO computes for a group of completions, each list by completion.

    Attributes:
        rewards: What each reward function gives, by its name; None for no opinion.
        totals: The weighted sums.
        advantages: What the loss multiplies the probability ratios by.
        changes: How many times as likely one step made the completion.
    """

    rewards: dict[str, list[float | None]]
    totals: list[float]
    advantages: list[float]
    changes: list[float]


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


def sample_group(policy: Loaded, prompt: Tokens, settings: Values, number: int, seed: int) -> list[Completion]:
    """Sample `number` completions of a prompt as the trainer does."""
    (group,) = generate(
        policy.model,
        policy.tokenizer,
        [prompt],
        max_new_tokens=policy.room(len(prompt), settings["max_completion_length"]),
        samples=number,
        temperature=settings["temperature"],
        seed=seed,
    )
    # The trainers do not strip what the model wrote.
    return [replace(c, text=policy.tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in group]


def update(policy: Loaded, reference: Loaded, settings: Values, row: Values, prompt: Tokens, group: Group) -> Update:
    """Take one optimizer step of GRPO on a copy of the policy.

    Args:
        policy: The model that wrote the completions.
        reference: The model that the stage started from, for the KL penalty, if `beta` asks for one.
        settings: The stage's.
        row: The prompt, as messages, and the other columns of the data.
        prompt, group: The prompt's tokens, and completions of it.
    """
    # A stage with LoRA trained a new adapter, which changes less than all weights at the same learning rate would.
    model_args = ModelConfig(
        **{item.name: settings[item.name] for item in fields(ModelConfig) if item.name in settings}
    )
    options = {"reward_funcs": load_rewards(settings["reward_funcs"]), "peft_config": get_peft_config(model_args)}
    with _trainer(GRPOTrainer, policy, settings, row, prompt, group, **options) as trainer:
        if settings.get("beta"):
            trainer.beta = trainer.args.beta = settings["beta"]
            trainer.ref_model = frozen_copy(reference.model, trainer.temperature, cast_lm_head_to_fp32=False)
        before = _log_probs(trainer, prompt, group)
        trainer.train()
        after = _log_probs(trainer, prompt, group)
        table = trainer.all_rewards
        columns = [[None if math.isnan(reward) else reward for reward in column] for column in table.T.tolist()]
        return Update(
            rewards=dict(zip(trainer.reward_func_names, columns, strict=True)),
            totals=(table * trainer.reward_weights).nansum(dim=1).tolist(),
            advantages=list(trainer._logs["advantages"]),
            changes=(after - before).exp().tolist(),
        )


def token_view(
    policy: Loaded,
    reference: Loaded,
    run: Path,
    stage: str,
    settings: Values,
    row: Values,
    prompt: Tokens,
    completion: Completion,
) -> TokenView:
    """Return what PPO computes for each token of a completion. The arguments are as for `update`."""
    rewards: list[tuple[Any, Any]] = []
    rewards += [load_model(path, "reward_model_path", reward=True) for path in settings.get("reward_model_path") or []]
    if names := settings.get("reward_funcs"):
        rewards += [(function, None) for function in load_rewards(names)]
    weights = settings.get("reward_weights") or [1.0] * len(rewards)
    # What is only measured may need columns that a prompt of the page does not have.
    trained = [(reward, weight) for reward, weight in zip(rewards, weights, strict=True) if weight]
    chosen = dict(settings) | {"reward_weights": [weight for _, weight in trained]}
    options = {
        "reward_funcs": [function for (function, _), _ in trained],
        "reward_processing_classes": [tokenizer for (_, tokenizer), _ in trained],
        "value_model": str(run / stage / VALUE_MODEL_FOLDER),
    }
    # PPO compares every completion with the policy as it was when the trainer was made. A rollout has two of them.
    start = replace(policy, model=reference.model)
    with _trainer(PPOTrainer, start, chosen, row, prompt, [completion] * 2, **options) as trainer, torch.no_grad():
        trainer.model.load_state_dict(policy.model.state_dict())
        trainer.model.train()
        batch = trainer._generate_and_score_completions([dict(row)] * 2)
        mask, logps = batch["completion_mask"], batch["old_per_token_logps"]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], mask], dim=1)
        kl = torch.zeros_like(logps)
        if trainer.args.kl_coef > 0:
            compared = trainer._reference_logps(ids, attention_mask, mask.shape[1], len(ids))
            kl = ppo_math.kl_estimate(logps, compared, trainer.args.kl_estimator) * mask
        score = float((trainer.all_rewards[0] * trainer.reward_weights).nansum())
        penalty = 0.0 if completion.stopped else settings.get("missing_eos_penalty") or 0.0
        scores = torch.full((len(ids),), score - penalty, device=kl.device)
        columns = {
            "log_probs": logps,
            "kl": kl,
            "rewards": ppo_math.token_rewards(scores, trainer.args.kl_coef * kl, mask),
            "values": batch["old_values"],
            "advantages": batch["advantages"],
        }
        lists = {name: column[0].tolist() for name, column in columns.items()}
    return TokenView(completion.tokens, **lists, score=score, penalty=penalty)


@contextmanager
def _trainer(
    kind: type[Any], loaded: Loaded, settings: Values, row: Values, prompt: Tokens, group: Group, **options: Any
) -> Iterator[Any]:
    """Make a trainer of a copy of a model for one step on a prompt, whose completions are given."""
    config = PPOConfig if kind is PPOTrainer else GRPOConfig
    unread = {item.name for item in fields(TrainingArguments) if not item.name.startswith(OPTIMIZER)}
    names = {item.name for item in fields(config)} - unread - set(SWITCHED_OFF)
    kept = {name: settings[name] for name in names if name in settings and not name.startswith("vllm_")}
    fixed: dict[str, Any] = {
        "beta": 0.0,
        "num_generations": len(group),
        "num_iterations": 1,
        "per_device_train_batch_size": len(group),
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": loaded.model.device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    fixed |= {"whiten_advantages": False} if kind is PPOTrainer else {}

    def sampled(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        ids = [completion.tokens for completion in group]
        return {"prompt_ids": [list(prompt)] * len(group), "completion_ids": ids, "logprobs": None}

    with tempfile.TemporaryDirectory() as folder, unchanged_random_state(), warnings.catch_warnings():
        # What the libraries deprecate is not for whoever looks at the page.
        warnings.simplefilter("ignore")
        # A new adapter is random.
        set_seed(settings.get("seed", 0))
        # The weights that an adapter was merged into are frozen.
        trainer = kind(
            model=copy.deepcopy(loaded.model).requires_grad_(True),
            args=config(**kept | fixed, output_dir=folder),
            train_dataset=Dataset.from_list([dict(row)] * len(group)),
            # TRL gives it a padding token.
            processing_class=copy.deepcopy(loaded.tokenizer),
            rollout_func=sampled,
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer


@torch.no_grad()
def _log_probs(trainer: Any, prompt: Tokens, group: Group) -> Tensor:
    """Return the log-probability of each completion under the trainer's policy."""
    trainer.model.eval()
    rows = [torch.tensor([*prompt, *completion.tokens]) for completion in group]
    length = max(map(len, rows)) - len(prompt)
    ids = pad_sequence(rows, batch_first=True).to(trainer.accelerator.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(ids.device)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    total: Tensor = (logps * mask[:, -length:]).sum(dim=1)
    return total
