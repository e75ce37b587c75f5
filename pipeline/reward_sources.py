"""Where PPO's rewards come from: reward models by path, functions by name, in any mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import Problem, UserError


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


def load_reward_sources(args: RewardArguments) -> list[str | Callable[..., Any]]:
    """Check reward models, and find reward functions.

    Args:
        args: Names at least one.

    Returns:
        Paths, then functions, as TRL's trainers take them.

    Raises:
        UserError: With every one that cannot be used, if there are such, or if there is none.
    """
    from transformers import AutoConfig

    from pipeline.rewards import load_rewards

    problems: list[Problem] = []
    for path in args.reward_model_path or []:
        try:
            labels = AutoConfig.from_pretrained(path).num_labels
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            problems.append(
                Problem("reward_model_path", path, f"no model can be loaded from there ({reason})")
            )
            continue
        if labels != 1:
            remedy = f"has {labels} labels; give a sequence classifier with one, as RewardTrainer makes it"
            problems.append(Problem("reward_model_path", path, remedy))
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
