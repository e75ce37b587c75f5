"""What the recipes that sample read: rewards, prompts and, for GRPO, the answers to them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from trl import GRPOConfig, ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.errors import Problem
from pipeline.rl.ppo_config import PPOConfig

if TYPE_CHECKING:  # imports take seconds, which `--help` does not have
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from pipeline.data.splits import Split


@dataclass
class PPORewardArguments:
    """What scores a completion. The scores are added up, weighted by `reward_weights`: models first."""

    trains_critic: ClassVar[bool] = True
    """Whether a critic as large as the model is trained and saved beside it."""
    reward_model_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models: paths or Hub ids of sequence classifiers with one label, or of adapters of such."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names of `pipeline.rewards.functions`, or package.module:function."},
    )
    value_model_path: str | None = field(
        default=None,
        metadata={
            "help": "What the critic starts from: a critic, a reward model or a language model. Default: the first "
            "reward model that has the policy's vocabulary, or else the policy."
        },
    )

    def find_problems(
        self, training_args: Any, tokenizer: PreTrainedTokenizerBase | None, train: Split | None
    ) -> list[Problem]:
        """As `pipeline.training.inputs.RewardChecks` asks for it."""
        from pipeline.rl import reward_checks

        models, functions = self.reward_model_path or [], self.reward_funcs or []
        if not models and not functions:
            return [Problem("reward_model_path", "nothing", "name a reward model, or reward_funcs")]
        weights = getattr(training_args, "reward_weights", None)
        problems = reward_checks.check_rewards(models, functions, weights, train)
        if self.value_model_path is not None:
            problems += reward_checks.check_value_model(self.value_model_path, tokenizer)
        return problems


def load_ppo_inputs(
    reward_args: PPORewardArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig
) -> tuple[list[str | Callable[..., Any]], PreTrainedTokenizerBase, Split, Split | None]:
    """Load reward functions, tokenizer and prompts, and check that they fit each other and the models.

    Returns:
        Paths of reward models, then functions, as TRL's trainers take them; the tokenizer, the training split,
        and the evaluation split or `None`.

    Raises:
        UserError: With everything that is wrong with any of them.
    """
    from pipeline.rewards.loading import load_rewards
    from pipeline.training.inputs import load_inputs

    tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args, reward_args)
    functions = load_rewards(reward_args.reward_funcs) if reward_args.reward_funcs else []
    return [*(reward_args.reward_model_path or []), *functions], tokenizer, train, evaluation


@dataclass
class GRPORewardArguments:
    """What is rewarded. Several rewards are added up, weighted by `reward_weights`."""

    trains_critic: ClassVar[bool] = False
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_answer"],
        metadata={"help": "Rewards: names of `pipeline.rewards.functions`, or any importable package.module:function."},
    )
    shuffle_answers: bool = field(
        default=False,
        metadata={
            "help": "Give every training prompt another's reference answer: a control experiment, whose run "
            "must not get better."
        },
    )

    def find_problems(
        self, training_args: Any, tokenizer: PreTrainedTokenizerBase | None, train: Split | None
    ) -> list[Problem]:
        """As `pipeline.training.inputs.RewardChecks` asks for it."""
        from datasets import Dataset

        from pipeline.rl import reward_checks

        weights = getattr(training_args, "reward_weights", None)
        problems = reward_checks.check_rewards([], self.reward_funcs, weights, train)
        if self.shuffle_answers and train is not None:
            columns = reward_checks.column_names(train)
            if not isinstance(train, Dataset) or "answer" not in columns:
                remedy = "needs an answer column, and data that are not streamed"
                problems.append(Problem("shuffle_answers", "true", remedy))
        return problems


def load_grpo_inputs(
    reward_args: GRPORewardArguments, data_args: DataArguments, training_args: GRPOConfig, model_args: ModelConfig
) -> tuple[list[Callable[..., Any]], PreTrainedTokenizerBase, Split, Split | None]:
    """Load reward functions, tokenizer and data, and check that they fit each other and the model.

    Returns:
        The reward functions, the tokenizer, the training split, and the evaluation split or `None`.

    Raises:
        UserError: With everything that is wrong with any of them.
    """
    from pipeline.rewards.loading import load_rewards
    from pipeline.training.inputs import load_inputs

    tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args, reward_args)
    if reward_args.shuffle_answers:
        train = shuffle_answers(train, training_args.seed)
    return load_rewards(reward_args.reward_funcs), tokenizer, train, evaluation


def shuffle_answers(dataset: Dataset, seed: int) -> Dataset:
    """`dataset` with its `answer` column in another order: the same answers, to other prompts."""
    answers = list(dataset["answer"])
    random.Random(seed).shuffle(answers)
    return dataset.remove_columns("answer").add_column("answer", answers)
