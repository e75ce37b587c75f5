"""What stage 3's PPO recipe reads: its reward models, its reward functions and its prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl import ModelConfig

from pipeline.arguments import DataArguments
from pipeline.errors import Problem
from pipeline.ppo_config import PPOConfig

if TYPE_CHECKING:  # `--help` needs none of these, and they take their time
    from transformers import PreTrainedTokenizerBase

    from pipeline.data import Split


@dataclass
class PPORewardArguments:
    """What scores a completion. The scores are added up, weighted by `reward_weights`: models first."""

    reward_model_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward models: paths or Hub ids of sequence classifiers with one label, or of adapters of such."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Reward functions: names of `pipeline.rewards`, or package.module:function."},
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
        """As `pipeline.inputs.RewardChecks` asks for it."""
        from pipeline import reward_sources

        models, functions = self.reward_model_path or [], self.reward_funcs or []
        if not models and not functions:
            return [Problem("reward_model_path", "nothing", "name a reward model, or reward_funcs")]
        weights = getattr(training_args, "reward_weights", None)
        problems = reward_sources.check_rewards(models, functions, weights, train)
        if self.value_model_path is not None:
            problems += reward_sources.check_value_model(self.value_model_path, tokenizer)
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
    from pipeline.inputs import load_inputs
    from pipeline.rewards import load_rewards

    tokenizer, train, evaluation = load_inputs("prompt", data_args, training_args, model_args, reward_args)
    functions = load_rewards(reward_args.reward_funcs) if reward_args.reward_funcs else []
    return [*(reward_args.reward_model_path or []), *functions], tokenizer, train, evaluation
