"""Checks of the reward arguments: reward models by path, reward functions by name."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainerState
from trl.trainer.utils import is_async_callable

from pipeline.data.columns import PASSED_BY_TRL, Split, column_names
from pipeline.errors import Problem, UserError, collect
from pipeline.models import loading
from pipeline.rewards.functions import MEASURED_ONLY
from pipeline.rewards.loading import built_in_name, load_rewards
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

    There is a weight for each, models first; by default 1. `train` is None if it failed to load. If `early`, the models
    may not exist yet, and are not checked.
    """
    problems, number = [], len(models) + len(functions)
    if weights is not None:
        shown = " ".join(f"{weight:g}" for weight in weights)
        if len(weights) != number:
            problems.append(Problem("reward_weights", shown, f"give one weight for each of the {number} rewards"))
        elif not any(weights):
            problems.append(Problem("reward_weights", shown, "all weights are 0; set at least one to another value"))
    for path in [] if early else models:
        problems += check_reward_model(path)
    if models and not functions:
        return problems
    with collect(problems):
        for index, (name, function) in enumerate(zip(functions, load_rewards(functions), strict=True), len(models)):
            if name in functions[: index - len(models)]:
                problems.append(Problem("reward_funcs", name, "is named twice; raise its weight instead"))
            weight = 1.0 if weights is None else weights[index] if len(weights) == number else 0.0
            if built_in_name(inspect.unwrap(function)) in MEASURED_ONLY and weight != 0:
                remedy = f"{name} is only for measuring and must not be trained on; give it the weight 0"
                problems.append(Problem("reward_weights", weight if weights else "nothing", remedy))
            if train is None:
                continue
            columns = column_names(train)
            parameters = inspect.signature(function).parameters.values()
            required = [item.name for item in parameters if item.default is item.empty and item.kind in BY_NAME]
            if missing := [column for column in required if column not in (*PASSED_BY_TRL, *columns)]:
                hint = " (set answer_column)" if missing == ["answer"] else ""
                remedy = f"the data have no column {', '.join(missing)}, which it requires{hint}; they have: "
                problems.append(Problem("reward_funcs", name, remedy + ", ".join(columns)))
            elif ":" in name:
                # Call the user's function once, to find failures before training. TRL passes each column as a list.
                row = next(iter(train))
                given: dict[str, Any] = {column: [value] * 2 for column, value in row.items() if column != "prompt"}
                given |= {"prompts": [row["prompt"]] * 2, "completion_ids": [[0], [0]], "trainer_state": TrainerState()}
                given["completions"] = [[{"role": "assistant", "content": "The answer is 1."}]] * 2
                with collect(problems):
                    returned = function(**given, log_extra=lambda *_: None, log_metric=lambda *_: None)
                    if is_async_callable(function):
                        asyncio.run(returned)
    return problems


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
