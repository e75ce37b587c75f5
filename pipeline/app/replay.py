"""The trainers of the page: TRL's and PPO's own, whose rollout is a group of completions that was sampled before.

A trainer works on copies of the models of a run, under the settings that the stage was trained with. Only what needs
more than one prompt is switched off: normalisation over a rollout, accumulation of gradients, schedules.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, TrainingArguments, set_seed
from trl import GRPOConfig

from pipeline.app.models import Loaded, Values
from pipeline.rl.alarms import CollapseAlarms
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.dialogue import Dialogue
from pipeline.tools.loading import Toolbox, load_toolbox
from pipeline.training.reliable import unchanged_random_state

OPTIMIZER = ("learning_rate", "weight_decay", "adam_", "max_grad_norm", "optim")
"""Prefixes of the transformers options that affect the step. All of TRL's and PPO's do, except for `SWITCHED_OFF`."""
SWITCHED_OFF = (
    "use_vllm", "use_transformers_continuous_batching", "generation_batch_size", "steps_per_generation",
    "num_generations_eval", "model_init_kwargs", "sync_ref_model", "log_completions", "log_completions_hub_repo",
    "reward_normalization", "value_warmup_steps", "frozen_dtype",
)  # fmt: skip

Group = Sequence[Dialogue]
"""Attempts at one prompt. Without tools, each is a single turn that is not parsed into messages."""


@dataclass(frozen=True)
class Update:
    """What GRPO computes for each token of a group in one update.

    Attributes:
        loss: The loss of the group.
        ratios: (completions, tokens), the ratio of the probability to the one it was sampled with. If the importance
            sampling level is the sequence, all tokens of a completion have the same.
        clipped: (completions, tokens), whether the ratio is clipped.
        terms: (completions, tokens), what each token adds to the loss, without KL penalty and entropy bonus.
        pushes: (completions, tokens), minus the derivatives of the loss with respect to the log-probabilities.
        learned: (completions, tokens), whether the token is part of the loss.
    """

    loss: float
    ratios: Tensor
    clipped: Tensor
    terms: Tensor
    pushes: Tensor
    learned: Tensor


class _Replay:
    """A trainer whose rollout is a `group` of dialogues that were sampled before, with the tools of `toolbox`."""

    group: Group
    toolbox: Toolbox | None
    environments: Any

    def _tool_call_loop(self, *_: Any) -> tuple[Any, ...]:
        """Return the dialogues, as TRL's method of this name does."""
        # Rewards may ask the environments, which know what happened.
        if self.toolbox and self.toolbox.environment:
            self.environments = [self.toolbox.environment_of(dialogue.tools) for dialogue in self.group]
        return (
            [dialogue.sampled for dialogue in self.group],
            [dialogue.messages for dialogue in self.group],
            [dialogue.tokens for dialogue in self.group],
            None,
            sum(dialogue.calls for dialogue in self.group),
            sum(dialogue.failures for dialogue in self.group),
            [[] for _ in self.group],
        )


class ReplayGRPO(_Replay, GRPOTrainer):
    """Records what each update computes for each token of the completions, in the order of the group.

    Attributes:
        log_probs: Log-probabilities (completions, tokens) before each update, without dropout.
        updates: What each update computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_probs: list[Tensor] = []
        self.updates: list[Update] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        # TRL shuffles the rows of the batch.
        batch["attempt"] = torch.arange(len(self.group))
        return batch

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        results = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._differentiable_logps = results[0]
        return results

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Return TRL's loss, and record its parts.

        TRL's loss also takes an advantage for each token. It is linear in each of them as long as their signs stay, so
        a token's term is its advantage times the derivative of the loss with respect to it.
        """
        self.log_probs.append(log_probs_of(self, self.group))
        self.model.train()
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"].unsqueeze(1).repeat(1, mask.shape[1]).requires_grad_()
        loss = super()._compute_loss(model, inputs | {"advantages": advantages})
        logps = self._differentiable_logps
        by_advantages, by_logps = torch.autograd.grad(loss, (advantages, logps), retain_graph=True)

        logps, advantages = logps.detach(), advantages.detach()
        old_logps = inputs.get("old_per_token_logps")
        log_ratios = logps - (logps if old_logps is None else old_logps)
        if self.importance_sampling_level == "sequence":
            means = (log_ratios * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)
            log_ratios = means.expand_as(log_ratios)
        ratios = log_ratios.exp()
        clipped = clipped_tokens(self, ratios, advantages)
        # The batch may be padded to more than its longest completion.
        length = max(len(dialogue.tokens) for dialogue in self.group)
        order = inputs["attempt"].argsort()
        columns = (ratios, clipped, by_advantages * advantages, -by_logps, mask.bool())
        self.updates.append(Update(float(loss), *(column[order, :length] for column in columns)))
        return loss


def clipped_tokens(trainer: Any, ratios: Tensor, advantages: Tensor) -> Tensor:
    """Return which ratios (completions, tokens) the loss of a trainer clips."""
    high = trainer.epsilon_high
    if trainer.loss_type == "cispo":
        return ratios > high
    # These losses have a smooth weight instead.
    if trainer.loss_type in ("sapo", "vespo"):
        return torch.zeros_like(ratios, dtype=torch.bool)
    falls_further = (ratios < 1 - trainer.epsilon_low) & (advantages < 0)
    rises_further = (ratios > 1 + high) & (advantages > 0)
    clipped = falls_further | rises_further
    if trainer.args.delta is not None:
        clipped |= (ratios > trainer.args.delta) & (advantages < 0)
    return clipped


class ReplayPPO(_Replay, PPOTrainer):
    pass


@contextmanager
def replay_trainer(
    kind: Any, loaded: Loaded, settings: Values, row: Values, group: Group, updates: int = 1, **options: Any
) -> Iterator[Any]:
    """Make a trainer of a copy of a model for `updates` steps on a prompt, whose completions are `group`."""
    prompts = [dialogue.prompt for dialogue in group]
    tokens = [dialogue.tokens for dialogue in group]
    toolbox = load_toolbox(settings, loaded.tokenizer)
    if toolbox:
        options |= {"tools": list(toolbox.tools), "environment_factory": toolbox.environment}
    with tempfile.TemporaryDirectory() as folder, unchanged_random_state(), _without_warnings():
        # A new adapter gets random weights.
        set_seed(settings.get("seed", 0))
        trainer = kind(
            # The weights that an adapter was merged into are frozen.
            model=copy.deepcopy(loaded.model).requires_grad_(True),
            args=_config(kind, settings, folder, len(group), updates, loaded.model.device),
            train_dataset=Dataset.from_list([dict(row)] * len(group)),
            # A copy, because TRL may give it a padding token.
            processing_class=copy.deepcopy(loaded.tokenizer),
            rollout_func=lambda *_: {"prompt_ids": prompts, "completion_ids": tokens, "logprobs": None},
            **options,
        )
        trainer.group = group
        trainer.toolbox = toolbox
        trainer.remove_callback(PrinterCallback)
        # What a visitor's prompt does is no alarm of the run.
        trainer.remove_callback(CollapseAlarms)
        yield trainer


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the libraries' warnings, which whoever started the page can do nothing about.

    They are about deprecations, and about rows without a reward, which TRL repeats whole: whatever a visitor typed.
    """
    logger = logging.getLogger("trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _config(kind: Any, settings: Values, folder: str, number: int, updates: int, device: torch.device) -> GRPOConfig:
    """Return the configuration of `updates` steps on `number` completions of a prompt, with the settings of the stage.

    Settings that today's configuration does not have any more, from a run of another release, are ignored.
    """
    config = PPOConfig if issubclass(kind, PPOTrainer) else GRPOConfig
    of_step: dict[str, Any] = {
        "beta": 0.0,
        "max_steps": updates,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "num_generations": number,
        "num_iterations": updates,
        "per_device_train_batch_size": number,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if config is PPOConfig:
        of_step["whiten_advantages"] = False
    of_transformers = {item.name for item in fields(TrainingArguments)}
    for item in fields(config):
        name = item.name
        if name not in settings or name in of_step or name in SWITCHED_OFF or name.startswith("vllm_"):
            continue
        if name not in of_transformers or name.startswith(OPTIMIZER):
            of_step[name] = settings[name]
    return config(output_dir=folder, **of_step)


@torch.no_grad()
def log_probs_of(trainer: Any, group: Group) -> Tensor:
    """Return the log-probabilities (completions, tokens) of the tokens of a group under the trainer's policy.

    They are 0 for padding and for what tools wrote.
    """
    device = trainer.accelerator.device

    def padded(rows: list[list[int]], side: str = "right") -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_side=side).to(device)

    prompts = [dialogue.prompt for dialogue in group]
    completions = [dialogue.tokens for dialogue in group]
    ids = torch.cat([padded(prompts, "left"), padded(completions)], dim=1)
    prompt_mask = padded([[1] * len(prompt) for prompt in prompts], "left")
    completion_mask = padded([[1] * len(completion) for completion in completions])
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    chosen = padded([dialogue.sampled for dialogue in group])
    trainer.model.eval()
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, chosen.shape[1])
    return logps * chosen
