"""Where rewards come from: reward models by path, functions by name. What can be told to be wrong with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pipeline.data.splits import Split
from pipeline.errors import Problem, UserError
from pipeline.models.loading import load_config, load_tokenizer, user_error_for, validate_weights
from pipeline.rewards.functions import MEASURED_ONLY
from pipeline.rewards.loading import load_rewards
from pipeline.rl.value_model import auto_class

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL hands every reward function beside the columns of the data."""


def check_rewards(
    models: Sequence[str], functions: Sequence[str], weights: Sequence[float] | None, train: Split | None
) -> list[Problem]:
    """Reward models and functions that cannot be used, or not with these data and weights.

    Args:
        models: As `check_reward_model` takes them.
        functions: Names, as `load_rewards` takes them.
        weights: One for each, models first; None for 1 each.
        train: The rows that are rewarded, or None if they are not known.
    """
    problems = []
    number = len(models) + len(functions)
    if weights is not None:
        shown = " ".join(f"{weight:g}" for weight in weights)
        if len(weights) != number:
            problems.append(Problem("reward_weights", shown, f"give one weight for each of the {number} rewards"))
        elif not any(weights):
            problems.append(Problem("reward_weights", shown, "nothing is rewarded; give one that is not 0"))
    for path in models:
        problems += check_reward_model(path)
    if models and not functions:
        return problems
    try:
        loaded = load_rewards(functions)
    except UserError as error:
        return problems + list(error.problems)
    twice = sorted({name for name in functions if list(functions).count(name) > 1})
    problems += [Problem("reward_funcs", name, "is named twice; give it more weight instead") for name in twice]
    for index, (name, function) in enumerate(zip(functions, loaded, strict=True), start=len(models)):
        if inspect.unwrap(function) in MEASURED_ONLY and (
            weights is None or (len(weights) == number and weights[index] != 0)
        ):
            remedy = f"{name} is for measuring, and must not be trained on: give it the weight 0"
            problems.append(Problem("reward_weights", weights[index] if weights else "nothing", remedy))
        if train is not None:
            problems += _missing_columns(name, function, column_names(train))
    return problems


def check_reward_model(path: str) -> list[Problem]:
    """A reward model that gives no single score, cannot read a conversation, or lacks weights.

    Its tokenizer may be another than the policy's: it is given text.

    Args:
        path: A folder or an id on the Hub.
    """
    field = "reward_model_path"
    config, problems = _load_config(field, path)
    if config is None:
        return problems
    if config.num_labels != 1:
        remedy = f"has {config.num_labels} labels; give a sequence classifier with one, as RewardTrainer makes it"
        problems.append(Problem(field, path, remedy))
    else:
        problems += _check_weights(field, path, config, AutoModelForSequenceClassification)
    try:
        tokenizer = load_tokenizer(path, field)
    except UserError as error:
        return problems + [Problem(field, path, problem.remedy) for problem in error.problems]
    if not tokenizer.chat_template:
        problems.append(Problem(field, path, "its tokenizer has no chat template; add one"))
    return problems + _check_vocabulary(field, path, config, tokenizer, "its tokenizer")


def check_value_model(path: str, tokenizer: PreTrainedTokenizerBase | None) -> list[Problem]:
    """A critic of several labels, one that lacks weights, or one that does not know the policy's tokens, which it is
    given as they are.

    Args:
        path: A folder or an id on the Hub.
        tokenizer: The policy's, or None if it is not known.
    """
    field = "value_model_path"
    config, problems = _load_config(field, path)
    if config is None:
        return problems
    if config.num_labels != 1 and any("Classification" in name for name in config.architectures or []):
        remedy = f"has {config.num_labels} labels; give a critic or a reward model, which have one"
        problems.append(Problem(field, path, remedy))
    else:
        problems += _check_weights(field, path, config, auto_class(config))
    if tokenizer is None:
        return problems
    try:
        own = load_tokenizer(path, field)
    except UserError:  # a critic is saved without one
        return problems + _check_vocabulary(field, path, config, tokenizer, "the policy's tokenizer")
    if own.get_vocab() != tokenizer.get_vocab():
        problems.append(Problem(field, path, "has another tokenizer than the policy; give a model that has the same"))
    return problems


def column_names(split: Split) -> list[str]:
    """The columns of a split, also of a stream that does not know them before its first row."""
    return list(split.column_names or next(iter(split)))


def _load_config(field: str, path: str) -> tuple[Any | None, list[Problem]]:
    try:
        with user_error_for(field, path):
            return load_config(path), []
    except UserError as error:
        return None, list(error.problems)


def _check_weights(field: str, path: str, config: Any, kind: Any) -> list[Problem]:
    fault = validate_weights(path, config, kind)
    return [Problem(field, path, fault)] if fault else []


def _check_vocabulary(
    field: str, path: str, config: Any, tokenizer: PreTrainedTokenizerBase, whose: str
) -> list[Problem]:
    known = getattr(config.get_text_config(), "vocab_size", None)
    if known is None or len(tokenizer) <= known:
        return []
    return [Problem(field, path, f"knows {known} tokens and {whose} {len(tokenizer)}; give one that fits")]


def _missing_columns(name: str, reward: Callable[..., Any], columns: Sequence[str]) -> list[Problem]:
    """Columns that a reward function requires, by its signature, and the data lack."""
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [
        p.name
        for p in inspect.signature(reward).parameters.values()
        if p.default is p.empty and p.kind in positional and p.name not in (*GIVEN, *columns)
    ]
    if not missing:
        return []
    remedy = f"there is no column {', '.join(missing)}; choose from: {', '.join(columns)}"
    if missing == ["answer"]:
        remedy += " (answer_column)"
    return [Problem("reward_funcs", name, f"it compares with {', '.join(missing)}, and {remedy}")]
