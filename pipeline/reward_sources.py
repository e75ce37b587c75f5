"""Where PPO's rewards come from: reward models by path, functions by name, in any mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, UserError

if TYPE_CHECKING:  # their import takes seconds, which `--help` has not
    from transformers import PreTrainedTokenizerBase

    from pipeline.arguments import DataArguments
    from pipeline.data import Split


@dataclass
class RewardArguments:
    """What scores a completion. The scores are added up, weighted by `reward_weights`: models first."""

    reward_model_path: list[str] | None = field(
        default=None,
        metadata={"help": "Reward models: paths or Hub ids of sequence classifiers with one label."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names of `pipeline.rewards`, or package.module:function."},
    )
    value_model_path: str | None = field(
        default=None,
        metadata={
            "help": "What the critic starts from: a critic or a reward model. Default: the first reward "
            "model if it has the policy's vocabulary, else the policy."
        },
    )


def load_ppo_inputs(
    reward_args: RewardArguments, data_args: DataArguments, training_args: Any, model_args: Any
) -> tuple[list[str | Callable[..., Any]], PreTrainedTokenizerBase, Split, Split | None]:
    """Find the reward sources, load tokenizer and prompts, and check that they fit each other.

    Returns:
        The reward sources, the tokenizer, the training split, and the evaluation split or `None`.

    Raises:
        UserError: With everything that is wrong with any of them.
    """
    from transformers import AutoConfig

    from pipeline.inputs import load_inputs

    problems: list[Problem] = []
    sources: list[str | Callable[..., Any]] = []
    try:
        sources = load_reward_sources(reward_args)
        weights = training_args.reward_weights
        if weights is not None and len(weights) != len(sources):
            remedy = f"give one weight for each of the {len(sources)} reward models and functions, models first"
            problems.append(Problem("reward_weights", weights, remedy))
    except UserError as error:
        problems += error.problems
    if reward_args.value_model_path is not None:
        try:
            AutoConfig.from_pretrained(reward_args.value_model_path)
        except (OSError, ValueError) as error:
            remedy = f"no model can be loaded from there ({_first_line(error)})"
            problems.append(Problem("value_model_path", reward_args.value_model_path, remedy))
    try:
        tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return sources, tokenizer, train, evaluation


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def load_reward_sources(args: RewardArguments) -> list[str | Callable[..., Any]]:
    """Check reward models, and find reward functions.

    Args:
        args: Names at least one.

    Returns:
        Paths, then functions, as TRL's trainers take them.

    Raises:
        UserError: With every one that cannot be used, if there are such, or if there is none.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from pipeline.rewards import load_rewards
    from pipeline.weight_files import find_fault

    problems: list[Problem] = []
    for path in args.reward_model_path or []:
        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            remedy = f"no model can be loaded from there ({_first_line(error)})"
            problems.append(Problem("reward_model_path", path, remedy))
            continue
        if config.num_labels != 1:
            remedy = f"has {config.num_labels} labels; give a sequence classifier with one, as RewardTrainer makes it"
            problems.append(Problem("reward_model_path", path, remedy))
        elif Path(path).is_dir():
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config)
            if fault := find_fault(Path(path), model):
                problems.append(Problem("reward_model_path", path, fault))
    functions: list[Callable[..., Any]] = []
    if args.reward_funcs:
        try:
            functions = load_rewards(args.reward_funcs)
        except UserError as error:
            problems += error.problems
    if not args.reward_model_path and not args.reward_funcs:
        problems.append(Problem("reward_model_path", "nothing", "name a reward model, or reward_funcs"))
    if problems:
        raise UserError(*problems)
    return [*(args.reward_model_path or []), *functions]
