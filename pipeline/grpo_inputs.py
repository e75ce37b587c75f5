"""What stage 4's recipe reads: its rewards, its prompts and their answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig, ModelConfig

from pipeline.arguments import DataArguments
from pipeline.errors import Problem

if TYPE_CHECKING:  # `--help` needs none of these, and they take their time
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from pipeline.data import Split


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

    def find_problems(
        self, training_args: Any, tokenizer: PreTrainedTokenizerBase | None, train: Split | None
    ) -> list[Problem]:
        """As `pipeline.inputs.RewardChecks` asks for it."""
        from datasets import Dataset

        from pipeline import reward_sources

        weights = getattr(training_args, "reward_weights", None)
        problems = reward_sources.check_rewards([], self.reward_funcs, weights, train)
        if self.shuffle_answers and train is not None:
            columns = reward_sources.column_names(train)
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
    from pipeline.inputs import load_inputs
    from pipeline.rewards import load_rewards

    tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args, reward_args)
    if reward_args.shuffle_answers:
        train = shuffle_answers(train, training_args.seed)
    return load_rewards(reward_args.reward_funcs), tokenizer, train, evaluation


def shuffle_answers(dataset: Dataset, seed: int) -> Dataset:
    """`dataset` with its `answer` column in another order: the same answers, to other prompts."""
    answers = list(dataset["answer"])
    random.Random(seed).shuffle(answers)
    return dataset.remove_columns("answer").add_column("answer", answers)
