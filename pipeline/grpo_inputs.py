"""What stage 4's recipe reads: its rewards, its prompts and their answers."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig

from pipeline.arguments import DataArguments
from pipeline.data import Split
from pipeline.errors import Problem, UserError
from pipeline.inputs import load_inputs
from pipeline.rewards import load_rewards


@dataclass
class GRPORewardArguments:
    """What is rewarded. Several rewards are added up, weighted by `reward_weights`."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_answer"],
        metadata={"help": "Rewards: names of `pipeline.rewards`, or any importable package.module:function."},
    )
    shuffle_answers: bool = field(
        default=False,
        metadata={
            "help": "Give every training prompt another's reference answer: a control experiment, whose run "
            "must not get better."
        },
    )


def load_grpo_inputs(
    reward_args: GRPORewardArguments, data_args: DataArguments, training_args: GRPOConfig, model_args: Any
) -> tuple[list[Callable[..., Any]], PreTrainedTokenizerBase, Split, Split | None]:
    """Loads reward functions, tokenizer and data, and checks that they fit each other.

    Returns:
        The reward functions, the tokenizer, the training split, and the evaluation split or `None`.

    Raises:
        UserError: With everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    rewards: list[Callable[..., Any]] = []
    try:
        rewards = load_rewards(reward_args.reward_funcs)
    except UserError as error:
        problems += error.problems
    weights = training_args.reward_weights
    if weights is not None and len(weights) != len(reward_args.reward_funcs):
        remedy = f"give one weight for each of the {len(reward_args.reward_funcs)} reward_funcs"
        problems.append(Problem("reward_weights", weights, remedy))
    try:
        tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    columns = list(train.column_names or next(iter(train)))
    for name, reward in zip(reward_args.reward_funcs, rewards, strict=False):
        problems += _missing_columns(name, reward, columns)
    if reward_args.shuffle_answers and not (isinstance(train, Dataset) and "answer" in columns):
        remedy = "needs an answer column, and data that are not streamed"
        problems.append(Problem("shuffle_answers", "true", remedy))
    if problems:
        raise UserError(*problems)
    if reward_args.shuffle_answers:
        train = shuffle_answers(train, training_args.seed)
    return rewards, tokenizer, train, evaluation


def shuffle_answers(dataset: Dataset, seed: int) -> Dataset:
    """`dataset` with its `answer` column in another order: the same answers, to other prompts."""
    answers = list(dataset["answer"])
    random.Random(seed).shuffle(answers)
    return dataset.remove_columns("answer").add_column("answer", answers)


def _missing_columns(name: str, reward: Callable[..., Any], columns: Sequence[str]) -> list[Problem]:
    """Columns that a reward function requires, by its signature, and the data lack."""
    given = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", *columns}
    parameters = inspect.signature(reward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [p.name for p in parameters if p.default is p.empty and p.kind in positional and p.name not in given]
    remedy = f"there is no column {', '.join(missing)}; choose from: {', '.join(columns)}"
    if missing == ["answer"]:
        remedy += " (answer_column)"
    return [Problem("reward_funcs", name, f"it compares with {', '.join(missing)}, and {remedy}")] if missing else []
