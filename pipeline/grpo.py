"""Stage 4's inputs, and TRL's `GRPOTrainer` with checkpoints that hold the rollout and a log-probability made
for CPUs."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from pipeline.arguments import DataArguments
from pipeline.data import Split
from pipeline.errors import Problem, UserError
from pipeline.inputs import load_inputs
from pipeline.rewards import load_rewards
from pipeline.rollout_file import load_rollout, save_rollout

LARGEST_LOGITS = 1 << 26
"""Logits, in elements, up to which they are computed whole on a CPU (256 MiB in float32)."""


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
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind in positional and p.name not in given
    ]
    remedy = f"there is no column {', '.join(missing)}; choose from: {', '.join(columns)}"
    if missing == ["answer"]:
        remedy += " (answer_column)"
    return (
        [Problem("reward_funcs", name, f"it compares with {', '.join(missing)}, and {remedy}")]
        if missing
        else []
    )


class GRPOTrainer(TRLGRPOTrainer):
    """TRL's, but resumed exactly wherever it stopped.

    TRL samples anew after a resume, though a rollout may serve several steps (`steps_per_generation` above
    `gradient_accumulation_steps`, or `num_iterations` above 1). Here a checkpoint holds what is left of it,
    one file a process. Evaluation, which samples too, has random numbers of its own.
    """

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        in_use = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        os.makedirs(output_dir, exist_ok=True)
        save_rollout(
            self._rollout_file(output_dir),
            (self._buffered_inputs or []) if in_use else [],
            {"step": self._step, "metrics": self._metrics["train"]},
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.isfile(self._rollout_file(checkpoint)):
            batches, state = load_rollout(self._rollout_file(checkpoint), self.accelerator.device)
            self._buffered_inputs, self._step = batches or None, state["step"]
            self._metrics["train"].update(state["metrics"])

    def _rollout_file(self, checkpoint: str) -> str:
        return os.path.join(checkpoint, f"rollout_{self.accelerator.process_index}.safetensors")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates with the same random numbers each time, and leaves training's alone."""
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            return super().evaluation_loop(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """On a CPU, from logits of the completion alone: TRL's tiles cover the prompt too, and cost a third
        of a step."""
        size = input_ids.size(0) * logits_to_keep * self.model.config.get_text_config().vocab_size
        known = inspect.signature(self.accelerator.unwrap_model(model).forward).parameters
        if (
            input_ids.device.type != "cpu"
            or size > LARGEST_LOGITS
            or "logits_to_keep" not in known
            or any(value is not None and value is not False for value in others.values())
        ):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **others
            )
        with self.accelerator.autocast():
            output = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_to_keep=logits_to_keep + 1,
                use_cache=False,
            )
        logits = output.logits[:, :-1].float() / self.temperature
        distribution = torch.log_softmax(logits, dim=-1)  # (B, T, V)
        log_probs = distribution.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
        entropy = None
        if compute_entropy:
            with torch.no_grad():
                entropy = -(distribution.exp() * distribution).sum(-1)
        return log_probs, entropy, None
