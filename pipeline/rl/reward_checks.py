"""Checks of the reward arguments: reward models by path, reward functions by name."""

import asyncio
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainerState
from trl.trainer.utils import is_async_callable

from pipeline.data.columns import PASSED_BY_TRL, Split, column_names
from pipeline.errors import Problem, UserError, collect
from pipeline.models import loading
from pipeline.rewards.loading import built_in_name, load_rewards
from pipeline.rewards.table import MEASURED_ONLY
from pipeline.rl.critic import VALUE_MODEL_FOLDER
from pipeline.rl.value_model import auto_class

# Kinds of parameters that TRL can pass to a reward function.
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check_rewards(
    models: Sequence[str],
    functions: Sequence[str],
    weights: Sequence[float] | None,
    train: Split | None,
    early: bool = False,
) -> list[Problem]:
    """Check that reward models and functions can be used, with these weights and data.

    Args:
        models: Reward models, by path or Hub id.
        functions: Reward functions, by name.
        weights: A weight for each, models first. None means 1 for each.
        train: The training data; None if they failed to load.
        early: Whether other steps run first, which may write the models. Then these are not checked.
    """
    problems = []
    number = len(models) + len(functions)
    if weights is not None:
        text = " ".join(f"{weight:g}" for weight in weights)
        if len(weights) != number:
            problems.append(Problem("reward_weights", text, f"give one weight for each of the {number} rewards"))
        elif not any(weights):
            problems.append(Problem("reward_weights", text, "all weights are 0; set at least one to another value"))
    if not early:
        for path in models:
            problems += check_reward_model(path)
    if models and not functions:
        return problems
    with collect(problems):
        loaded = load_rewards(functions)
        for index, (name, function) in enumerate(zip(functions, loaded, strict=True)):
            if name in functions[:index]:
                problems.append(Problem("reward_funcs", name, "is named twice; raise its weight instead"))
            weight = 1.0
            if weights is not None:
                # A wrong number of weights was reported above. They cannot be assigned to functions.
                weight = weights[len(models) + index] if len(weights) == number else 0.0
            if built_in_name(inspect.unwrap(function)) in MEASURED_ONLY and weight != 0:
                remedy = f"{name} is only for measuring and must not be trained on; give it the weight 0"
                problems.append(Problem("reward_weights", weight if weights else "nothing", remedy))
            if train is not None:
                problems += _check_columns(name, function, train)
    return problems


def _check_columns(name: str, function: Callable[..., Any], train: Split) -> list[Problem]:
    """Check that the data have the columns that a reward function requires, and call a function of the user once."""
    columns = column_names(train)
    missing = missing_columns(function, columns)
    if missing:
        hint = " (set answer_column)" if missing == ["answer"] else ""
        remedy = f"the data have no column {', '.join(missing)}, which it requires{hint}; they have: "
        return [Problem("reward_funcs", name, remedy + ", ".join(columns))]
    problems: list[Problem] = []
    if ":" in name:
        with collect(problems):
            _try_on_first_row(function, train)
    return problems


def missing_columns(function: Callable[..., Any], columns: Collection[str]) -> list[str]:
    """Return the columns that a reward function requires by its signature, and that are not among `columns`."""
    missing = []
    for parameter in inspect.signature(function).parameters.values():
        is_required = parameter.default is parameter.empty and parameter.kind in BY_NAME
        if is_required and parameter.name not in (*PASSED_BY_TRL, *columns):
            missing.append(parameter.name)
    return missing


def _try_on_first_row(function: Callable[..., Any], train: Split) -> None:
    """Call a reward function on two completions of the first prompt, as TRL does, with each column as a list.

    `load_rewards` has wrapped the function so that it raises a `UserError` if it fails.
    """
    row = next(iter(train))
    arguments: dict[str, Any] = {column: [value] * 2 for column, value in row.items() if column != "prompt"}
    arguments |= {
        "prompts": [row["prompt"]] * 2,
        "completions": [[{"role": "assistant", "content": "The answer is 1."}]] * 2,
        "completion_ids": [[0], [0]],
        "trainer_state": TrainerState(),
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }
    rewards = function(**arguments)
    if is_async_callable(function):
        asyncio.run(rewards)


def check_reward_model(path: str) -> list[Problem]:
    """Check that a reward model, by path or Hub id, gives a single score, and has a chat template and all weights."""
    field = "reward_model_path"
    try:
        with loading.user_error_for(field, path):
            config = loading.load_config(path)
        tokenizer = loading.load_tokenizer(path, field)
    except UserError as error:
        return list(error.problems)
    fault = loading.validate_kind(config, reward=True)
    if config.architectures and not loading.is_reward_model(config):
        fault = f"is a {config.architectures[0]}; give a reward model: a sequence classifier with one label"
    fault = fault or loading.validate_weights(path, config, AutoModelForSequenceClassification)
    faults = [fault, loading.validate_chat(tokenizer), loading.validate_vocabulary(config, tokenizer)]
    return [Problem(field, path, fault) for fault in faults if fault]


def check_value_model(path: str, tokenizer: PreTrainedTokenizerBase | None) -> list[Problem]:
    """Check that a critic, by path or Hub id, has one label, all of its weights, and the `tokenizer`'s vocabulary."""
    field = "value_model_path"
    try:
        with loading.user_error_for(field, path):
            source = loading.local_copy(path, VALUE_MODEL_FOLDER)
            config = loading.load_config(source)
    except UserError as error:
        return list(error.problems)
    faults = [loading.validate_weights(source, config, auto_class(config))]
    if config.num_labels != 1 and any("Classification" in name for name in config.architectures or []):
        faults = [f"has {config.num_labels} labels; give a critic or a reward model, which has one"]
    if tokenizer is not None:
        try:
            if loading.load_tokenizer(source, field).get_vocab() != tokenizer.get_vocab():
                faults.append("has a different tokenizer than the policy; give a model with the same one")
        except UserError:
            # A critic is saved without a tokenizer.
            faults.append(loading.validate_vocabulary(config, tokenizer, "the policy's tokenizer"))
    return [Problem(field, path, fault) for fault in faults if fault]
