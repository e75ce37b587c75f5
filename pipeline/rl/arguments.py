"""Arguments and inputs of the recipes that sample: rewards, prompts and, for GRPO, their answers."""

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, ModelConfig

from pipeline.data.arguments import DataArguments, option
from pipeline.data.columns import Split
from pipeline.errors import Problem, UserError
from pipeline.models.loading import load_model
from pipeline.rewards.loading import load_rewards
from pipeline.rl.reward_checks import check_rewards, check_value_model
from pipeline.tools.loading import ToolArguments, load_environment
from pipeline.training.inputs import load_inputs


@dataclass(kw_only=True)
class SampledArguments(ToolArguments):
    """Arguments of PPO and GRPO alike: the tools. Their rewards are checked here as well."""

    # Whether a critic as large as the model is trained and saved with it.
    trains_critic: ClassVar[bool] = False

    def preflight(
        self, training_args: Any, tokenizer: PreTrainedTokenizerBase | None, train: Split | None, early: bool = False
    ) -> list[Problem]:
        """Check tools, rewards and critic on behalf of `pipeline.training.inputs.load_inputs`.

        Tokenizer and data are None if they failed to load. If `early`, reward models and critic may not exist yet.
        """
        problems = super().preflight(training_args, tokenizer, train, early)
        models = getattr(self, "reward_model_path", None) or []
        functions = getattr(self, "reward_funcs", None) or []
        weights = getattr(training_args, "reward_weights", None)
        # Without models and functions, an environment may give the only reward.
        environment_rewards = False
        with suppress(UserError):
            environment_rewards = hasattr(load_environment(self.environment), "get_reward")
        has_rewards = bool(models or functions)
        if self.trains_critic and not has_rewards and not environment_rewards:
            problems.append(Problem("reward_model_path", "nothing", "name a reward model, or set reward_funcs"))
        elif has_rewards or not environment_rewards:
            problems += check_rewards(models, functions, weights, train, early)
        critic = getattr(self, "value_model_path", None)
        if critic is not None and not early:
            problems += check_value_model(critic, tokenizer)
        can_shuffle = train is None or (isinstance(train, Dataset) and "answer" in train.column_names)
        if getattr(self, "shuffle_answers", False) and not can_shuffle:
            remedy = "needs an answer column, and data that are not streamed"
            problems.append(Problem("shuffle_answers", "true", remedy))
        return problems


@dataclass
class PPORewardArguments(SampledArguments):
    """Rewards and critic of PPO. The score of a completion is the sum of its rewards, weighted by `reward_weights`."""

    trains_critic: ClassVar[bool] = True
    reward_model_path: list[str] | None = option(  # noqa: RUF009
        None, "Reward models: paths or Hub ids of sequence classifiers with one label, or of their adapters."
    )
    reward_funcs: list[str] | None = option(  # noqa: RUF009
        None, "Reward functions: names of `pipeline.rewards.functions`, or package.module:function."
    )
    value_model_path: str | None = option(
        None,
        "What the critic starts from: a critic, a reward model or a language model. Default: the first reward model "
        "with a weight that has the policy's vocabulary, otherwise the policy.",
    )
    value_use_peft: bool = option(True, "With use_peft, train the critic as an adapter, too, on its starting model.")


@dataclass
class GRPORewardArguments(SampledArguments):
    """Rewards of GRPO. The score of a completion is the sum of its rewards, weighted by `reward_weights`."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_answer"],
        metadata={"help": "Reward functions: names of `pipeline.rewards.functions`, or package.module:function."},
    )
    shuffle_answers: bool = option(
        False, "Shuffle the answers among the training prompts: a control experiment that must not improve the model."
    )


def load_rl_inputs(
    data_args: DataArguments,
    reward_args: PPORewardArguments | GRPORewardArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
) -> tuple[list[PreTrainedModel | Callable[..., Any]], PreTrainedTokenizerBase, Split, Split | None]:
    """Load rewards, tokenizer and prompts, and check that they match each other and the models.

    Return the rewards (models, then functions), the tokenizer, the training split, and the evaluation split or None.
    """
    tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args, reward_args)
    functions: list[Callable[..., Any]] = []
    if reward_args.reward_funcs:
        functions = load_rewards(reward_args.reward_funcs)
    # TRL would load them with the policy's options.
    models = [
        load_model(name, "reward_model_path", reward=True, dtype=torch.float32)[0]
        for name in getattr(reward_args, "reward_model_path", None) or []
    ]
    if getattr(reward_args, "shuffle_answers", False):
        train = shuffle_answers(train, training_args.seed)
    return [*models, *functions], tokenizer, train, evaluation


def shuffle_answers(dataset: Dataset, seed: int) -> Dataset:
    """Shuffle the `answer` column, so that prompts get the answers of other prompts."""
    answers = list(dataset["answer"])
    random.Random(seed).shuffle(answers)
    return dataset.remove_columns("answer").add_column("answer", answers)
