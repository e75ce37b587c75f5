"""What PPO and GRPO compute for one prompt: the stage's own trainer, on copies of the models of a run.

The page samples the completions itself. Everything after that is the trainer's: rewards, advantages, loss and optimizer
step, under the settings that the stage was trained with (`arguments.json`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from trl import ModelConfig, get_peft_config
from trl.trainer.utils import get_callable_name

from pipeline.app.models import Loaded, Values
from pipeline.app.replay import Group, ReplayGRPO, ReplayPPO, log_probs_of, replay_trainer
from pipeline.errors import Problem, UserError, refuse
from pipeline.files import read_json, relocate
from pipeline.models.generation import end_tokens
from pipeline.models.loading import load_model
from pipeline.rewards.loading import load_rewards
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.reward_checks import missing_columns
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import load_toolbox
from pipeline.training.frozen_weights import frozen_copy


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


def update(
    policy: Loaded, reference: Loaded, settings: Values, row: Values, group: Group, updates: int = 1
) -> SimpleNamespace:
    """Take optimizer steps of GRPO on a copy of the policy that wrote the group of completions of a row's prompt.

    `reference` is the model that the stage started from, for the KL penalty, if `beta` asks for one. Return, for each
    completion, its `rewards` by function (None for no opinion), their weighted sum in `totals`, the `advantages`, and
    in `changes` the factor by which the first step changed its probability. `updates` has what each step computed for
    each token, `log_probs` their log-probabilities before each step and after the last one, and `args` the
    configuration of the trainer.
    """
    # A stage with LoRA trained a new adapter, which changes less than all weights would at the same learning rate.
    adapter = ModelConfig(**{item.name: settings[item.name] for item in fields(ModelConfig) if item.name in settings})
    # Without reward functions, only an environment gives a reward.
    functions: list[Any] = []
    if settings["reward_funcs"]:
        functions = load_rewards(settings["reward_funcs"])
    _check_row(functions, row)
    options = {"reward_funcs": functions, "peft_config": get_peft_config(adapter)}
    with replay_trainer(ReplayGRPO, policy, settings, row, group, updates, **options) as trainer:
        if settings.get("beta"):
            trainer.beta = trainer.args.beta = settings["beta"]
            trainer.ref_model = frozen_copy(reference.model, trainer.temperature, cast_lm_head_to_fp32=False)
        trainer.train()
        log_probs = [*trainer.log_probs, log_probs_of(trainer, group)]
        table = trainer.all_rewards
        rewards = {}
        for name, column in zip(trainer.reward_func_names, table.T.tolist(), strict=True):
            rewards[name] = [None if math.isnan(reward) else reward for reward in column]
        return SimpleNamespace(
            rewards=rewards,
            totals=(table * trainer.reward_weights).nansum(dim=1).tolist(),
            advantages=list(trainer._logs["advantages"]),
            changes=(log_probs[1] - log_probs[0]).sum(dim=1).exp().tolist(),
            updates=trainer.updates,
            log_probs=log_probs,
            args=trainer.args,
        )


def token_view(
    policy: Loaded, reference: Loaded, run: Path, stage: str, settings: Values, row: Values, completion: Dialogue
) -> SimpleNamespace:
    """Return what PPO computes for a completion.

    The `score` of the completion, before the `penalty` for a missing end of turn, is a number. The other results are
    lists with an entry for each of its `tokens`, None for one that a tool wrote: `log_probs`, `kl`, `rewards`, `values`
    and `advantages`, before whitening.
    """
    functions, tokenizers, weights = _paying_rewards(settings, row)
    options: dict[str, Any] = {
        "reward_funcs": functions,
        "reward_processing_classes": tokenizers,
        "value_model": str(run / stage / VALUE_MODEL_FOLDER),
    }
    # A new trainer copies its model as the reference, so it starts with the reference, then gets the policy's weights.
    start = replace(policy, model=reference.model)
    settings = {**settings, "reward_weights": weights}
    # `PPOConfig` rejects a rollout of a single completion, so it is passed twice, and the first result is used.
    with replay_trainer(ReplayPPO, start, settings, row, [completion] * 2, **options) as trainer:
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


def _check_row(functions: Sequence[Callable[..., Any]], row: Values) -> None:
    """Raise a `UserError` if the row of a prompt lacks a column that a reward function requires.

    A held-out prompt has all of them, but a typed one has only an answer, if the visitor gave one.
    """
    problems = []
    for function in functions:
        name = get_callable_name(function)
        missing = missing_columns(function, row)
        if missing == ["answer"]:
            remedy = f"the reward {name} compares with it; type the right result"
            problems.append(Problem("answer", "nothing", remedy))
        elif missing:
            remedy = f"requires the column {', '.join(missing)}, which a typed prompt lacks; choose a held-out prompt"
            problems.append(Problem("reward_funcs", name, remedy))
    refuse(*problems)


def _paying_rewards(settings: Values, row: Values) -> tuple[list[Any], list[Any], list[float]]:
    """Load the rewards of PPO that have a weight: models, then functions, each with its tokenizer (or None) and weight.

    Rewards that are only measured may need columns that a prompt of the page does not have. The others are checked.
    """
    rewards: list[tuple[Any, Any]] = []
    for path in settings.get("reward_model_path") or []:
        rewards.append(load_model(path, "reward_model_path", reward=True))
    names = settings.get("reward_funcs")
    if names:
        rewards += [(function, None) for function in load_rewards(names)]
    weights = settings.get("reward_weights") or [1.0] * len(rewards)
    paying = [(*reward, weight) for reward, weight in zip(rewards, weights, strict=True) if weight]
    _check_row([function for function, tokenizer, _ in paying if tokenizer is None], row)
    functions = [function for function, _, _ in paying]
    tokenizers = [tokenizer for _, tokenizer, _ in paying]
    return functions, tokenizers, [weight for _, _, weight in paying]
