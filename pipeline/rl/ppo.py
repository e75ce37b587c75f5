"""PPO for language models, on the engine of TRL's `GRPOTrainer`.

TRL removed its `PPOTrainer` after 1.12. This one inherits everything that is not PPO from `GRPOTrainer`: generation
(transformers or vLLM), reward models and reward functions, chat data, PEFT, logging, evaluation, checkpoints and
multi-process training, by way of `pipeline.rl.grpo`, which makes it resume exactly. It adds the critic, the KL penalty
per token inside the reward, generalised advantage estimation and the clipped value loss (`pipeline.rl.ppo_math`,
`pipeline.rl.value_model`).

    trainer = PPOTrainer(
        model="runs/pocket/2_sft",
        reward_funcs=["runs/pocket/3_reward", is_polite],
        args=PPOConfig("runs/pocket/3_ppo", kl_coef=0.05, max_completion_length=64),
        train_dataset=load_dataset("runs/pocket/data", "preferences", split="train"),
    )
    trainer.train()
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy

from pipeline.rl import ppo_math
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.ppo_metrics import rollout_means, rollout_sums, update_means, update_sums
from pipeline.rl.reference_model import copy_adapter, reference_adapter
from pipeline.rl.value_adapter import prepare_frozen
from pipeline.rl.value_model import (
    VALUE_MODEL_FOLDER,
    add_to_optimizer,
    build_value_model,
    check_in_optimizer,
    load_value_model,
    save_value_model,
    token_values,
)

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer(GRPOTrainer):
    """Trainer for Proximal Policy Optimization (PPO) with a learned critic.

    Each rollout, of `generation_batch_size` completions, is sampled, scored and given advantages once, and then trained
    on `num_iterations` times, in optimizer steps of `per_device_train_batch_size x gradient_accumulation_steps x
    processes` completions. Policy and critic are two networks stepped by one optimizer: one loss, one schedule, each
    with its own learning rate and its own gradient norm, clipped to `max_grad_norm` separately. In the first
    `value_warmup_steps` steps the policy has no gradients: nothing of it changes, its state in the optimizer included.

    The score of a completion belongs to its last token. A completion that was cut off at `max_completion_length` is
    scored as it stands, without an end of turn, unless `missing_eos_penalty` or `mask_truncated_completions` is set.
    Nothing is learned from a completion for which every reward function returns None.

    The critic is saved as `value_model/` in `output_dir` and in every checkpoint. A checkpoint also contains the
    rollout that is being trained on, so that a resumed run continues with it: on one CPU process, bit for bit.

    The logs contain, besides what `GRPOTrainer` logs, the metrics of `pipeline.rl.ppo_metrics`.

    Args:
        model: The policy: a path, a Hub id, a model or a `PeftModel`, as for `GRPOTrainer`. Its present state is also
            the reference. For a `PeftModel` with `peft_config`, the reference is the base model without the adapter;
            for one that already has an adapter, a frozen copy of that adapter.
        reward_funcs: One or several reward models, paths or Hub ids of such, or Python functions, as for `GRPOTrainer`.
        args: The configuration. Default: `PPOConfig("<model>-PPO")`.
        train_dataset: Rows with `prompt`, conversational or text; all other columns are passed to the reward functions.
        eval_dataset: The same, or a dictionary of such data sets.
        processing_class: The tokenizer. Default: the model's.
        value_model: The critic: a token classification model with one label, which is itself trained; a reward model or
            a causal language model, which is copied; or a path or Hub id of any of these. Default: a copy of the first
            reward model with a weight that has the policy's vocabulary and at least as many embeddings, otherwise of
            the policy. The head of a reward model is copied in the units of the score, times the weight, if that model
            is the only reward and is not normalised. Every other critic starts by expecting nothing.
        peft_config: Train an adapter instead of the policy's own weights.
        value_use_peft: Beside an adapter, make the critic an adapter, too, on the frozen weights that it starts from.
        **kwargs: Any other argument of `GRPOTrainer`. The critic's parameters are added to an optimizer in
            `optimizers`. A scheduler beside it must know them: add those of `value_model` before you make it.

    Raises:
        ValueError: For a multimodal model, a critic with several labels, or a scheduler that does not know the critic.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        value_model: str | PreTrainedModel | PeftModel | None = None,
        peft_config: PeftConfig | None = None,
        value_use_peft: bool = True,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = PPOConfig(f"{name.split('/')[-1]}-PPO")
        if args.kl_coef > 0 and isinstance(model, PeftModel):
            copy_adapter(model)
        super().__init__(
            model=model,
            reward_funcs=list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **kwargs,
        )
        if self._is_vlm:
            raise ValueError("PPOTrainer trains text models: the critic does not read images")
        if args.kl_coef > 0 and not is_peft_model(self.model):
            self._copy_reference()
        # Compiled and wrapped models hide the classes and the names of weights that decide what becomes of them.
        reference, *rewards = (
            self._bare(model) if isinstance(model, nn.Module) else model
            for model in (self.ref_model, *self.reward_funcs)
        )
        prepare_frozen(self.model, [reference, *rewards], args)
        critic = build_value_model(
            value_model,
            policy=self.model,
            tokenizer=self._tokenizer,
            rewards=list(zip(rewards, self.reward_processing_classes, self.reward_weights.tolist(), strict=True)),
            args=args,
            use_peft=value_use_peft,
        ).to(self.accelerator.device)
        self.value_model = self.accelerator.prepare_model(critic)
        if self.lr_scheduler is not None:
            check_in_optimizer(self.optimizer, critic)
        self.parts.append(Critic(self))
        self._score_moments = ppo_math.Moments()
        self._critic_gradients_used = False
        self._rollout_sums: Tensor | float = 0.0
        self._update_sums: Tensor | float = 0.0

    def _bare(self, model: nn.Module) -> Any:
        """Return a model without what wraps it for several processes or for `torch.compile`."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    # ---- The rollout

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the parent's rewards, which it turns into group-relative advantages and discards."""
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let the parent sample and score, then replace its advantages (B,) by PPO's (B, T)."""
        mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        self._metrics[mode].pop("frac_reward_zero_std", None)  # PPO does not have groups

        mask = _sampled_tokens(batch)
        ended = ppo_math.ended(batch["completion_ids"], batch["completion_mask"], self.eos_token_ids)
        scores, scored = self._scores(mask.any(dim=1), ended, mode)
        if not scored.all():
            mask = batch["tool_mask"] = mask * scored.unsqueeze(1).int()
        batch["num_items_in_batch"] = self._sum_over_processes(mask.sum())

        ids, attention_mask = _whole_texts(batch)
        args, length = self.args, mask.shape[1]
        size = args.per_device_train_batch_size if mode == "train" else args.per_device_eval_batch_size
        with torch.no_grad():
            if "old_per_token_logps" not in batch:
                batch["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention_mask, length, size
                )
            logps = batch["old_per_token_logps"]
            ref_logps, penalty = None, torch.zeros_like(logps)
            if args.kl_coef > 0:
                ref_logps = self._reference_logps(ids, attention_mask, length, size)
                penalty = args.kl_coef * ppo_math.kl_estimate(logps, ref_logps, args.kl_estimator)
            values = self._values(ids, attention_mask, length, size)

        rewards = ppo_math.token_rewards(scores, penalty, mask)
        advantages, returns = ppo_math.generalized_advantages(rewards, values, mask, args.gamma, args.lam)
        if args.value_lam is not None:
            _, returns = ppo_math.generalized_advantages(rewards, values, mask, args.gamma, args.value_lam)
        self._rollout_sums = self._rollout_sums + rollout_sums(
            scores, scored, penalty, logps, ref_logps, values, returns, ended, mask
        )
        if mode == "train":
            self._log_rollouts()
        self._log_advantages(advantages, mask)
        if args.whiten_advantages:
            advantages = ppo_math.masked_whiten(advantages, mask, self._sum_over_processes)
        return batch | {"advantages": advantages, "returns": returns, "old_values": values}

    def _scores(self, trained: Tensor, ended: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Return this process's scores, normalised and penalised, and which completions have one, each (B,).

        Args:
            trained: (B,), whether any token of a completion is trained on. Otherwise it does not get a score.
            ended: (B,), whether it ended with an end of turn.
            mode: "train" or "eval".
        """
        rewards = self._rewards_per_func  # from all processes
        all_scores = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        all_scored = ~rewards.isnan().all(dim=1) & self.accelerator.gather(trained)
        running = self.args.reward_normalization == "running"
        moments = self._score_moments if running else ppo_math.Moments()
        if self.args.reward_normalization == "batch" or (running and mode == "train"):
            moments.update(all_scores[all_scored])
        rows = len(trained)
        local = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        scores, scored = moments.normalize(all_scores[local]), all_scored[local]
        if self.args.missing_eos_penalty is not None:
            scores = scores - self.args.missing_eos_penalty * ~ended
        return torch.where(scored, scores, 0.0), scored

    def _reference_logps(self, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int) -> Tensor:
        """Return the log-probabilities (B, `length`) of the last `length` tokens under the reference."""
        model = self.model if self.ref_model is None else self.ref_model
        with reference_adapter(self._bare(self.model)):
            logps, _, _ = self._get_per_token_logps_and_entropies(model, ids, attention_mask, length, batch_size)
        return logps

    def _values(self, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None = None) -> Tensor:
        """Return the critic's estimates (B, `length`), before each of the last `length` tokens is chosen."""
        self.value_model.train(self.model.training)
        return token_values(self.value_model, ids, attention_mask, length, batch_size, self.accelerator.autocast)

    # ---- The update

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """Keep the latest result, which the parent's loss consumes and the metrics need."""
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._latest_logps = [None if x is None else x.detach() for x in result]
        return result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Add the value loss to the parent's policy loss."""
        trains_policy = self.state.global_step >= self.args.value_warmup_steps
        mask = _sampled_tokens(inputs)
        values = self._values(*_whole_texts(inputs), mask.shape[1])
        losses, clipped = ppo_math.clipped_value_loss(
            values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        # As the parent normalises loss_type="dapo": by the tokens that an optimizer step has on average, per process.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        value_loss = self.args.vf_coef * ((losses * mask).sum() / tokens)
        if self.model.training and trains_policy:  # at once, so that one network at a time has activations
            self.accelerator.backward(value_loss)
            value_loss = value_loss.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_policy):
            policy_loss = super()._compute_loss(model, inputs)
        logps, entropies, _ = self._latest_logps
        log_ratio = logps - inputs["old_per_token_logps"]
        self._update_sums = self._update_sums + update_sums(
            log_ratio, entropies, inputs["advantages"], self.args.cliprange, losses.detach(), clipped, mask
        )
        if self.model.training and self.accelerator.sync_gradients:
            self._log_updates()
        return policy_loss + value_loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Add the critic's parameters to the policy's optimizer, with `value_learning_rate`."""
        optimizer = super().create_optimizer(model)
        critic = self._bare(self.value_model)
        add_to_optimizer(optimizer, critic, self.get_decay_parameter_names(critic), self.args)
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Do for the critic what `Trainer` does for the model: zero its gradients, and reduce them once per step."""
        if self._critic_gradients_used:
            self.value_model.zero_grad()
        last = self._critic_gradients_used = self.accelerator.sync_gradients
        with nullcontext() if last else self.accelerator.no_sync(self.value_model):
            return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip policy and critic each by its own norm, so that large gradients of one do not shrink the other's."""
        policy_norm = super()._clip_grad_norm(model)
        norm = nn.utils.clip_grad_norm_(self.value_model.parameters(), self.args.max_grad_norm)
        self._metrics["train"]["val/grad_norm"].append(norm.item())
        return policy_norm

    # ---- Checkpoints

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the critic to the Hub with the policy, also during training."""
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            copied = os.path.join(self.args.output_dir, VALUE_MODEL_FOLDER)
            shutil.copytree(os.path.join(checkpoint_folder, VALUE_MODEL_FOLDER), copied, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _rollout_state(self) -> dict[str, Any]:
        return super()._rollout_state() | {"moments": asdict(self._score_moments)}

    def _restore_rollout_state(self, state: dict[str, Any]) -> None:
        super()._restore_rollout_state(state)
        self._score_moments = ppo_math.Moments(**state["moments"])

    # ---- Metrics

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")

    def _evaluation_means(self) -> dict[str, float | None]:
        """Add PPO's metrics, from sums over the whole evaluation."""
        if self._evaluated:
            self._log_rollouts()
            self._log_updates()
        return super()._evaluation_means()

    def _log_rollouts(self) -> None:
        sums, self._rollout_sums = self._sum_over_processes(self._rollout_sums), 0.0
        self._log_metrics(rollout_means(sums, with_kl=self.args.kl_coef > 0))

    def _log_updates(self) -> None:
        sums, self._update_sums = self._sum_over_processes(self._update_sums), 0.0
        self._log_metrics(update_means(sums))

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """Show one advantage per completion in the table of completions: the mean over its tokens."""
        means = self.accelerator.gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for _ in means[: len(self._logs["advantages"])]:  # holds at most one rollout
            self._logs["advantages"].pop()  # the parent's
        self._logs["advantages"].extend(means)


class Critic:
    """A part of checkpoints (`pipeline.training.reliable`) and of the final model: the critic, in `value_model/`."""

    belongs_to_model = True

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer

    def save(self, folder: Path) -> None:
        """Save the critic."""
        save_value_model(self.trainer._bare(self.trainer.value_model), str(folder))

    def load(self, folder: Path) -> None:
        """Load the critic's weights."""
        load_value_model(self.trainer._bare(self.trainer.value_model), self.trainer.model, str(folder))


def _sampled_tokens(batch: dict[str, Any]) -> Tensor:
    """Return the mask of `pipeline.rl.ppo_math`."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def _whole_texts(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask (B, L) of the prompts with their completions."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
