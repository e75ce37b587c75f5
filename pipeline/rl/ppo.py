"""PPO for language models, on the engine of TRL's `GRPOTrainer`.

TRL removed its `PPOTrainer` after 1.12. This one adds the critic, the KL penalty per token inside the reward,
generalised advantage estimation and the clipped value loss (`pipeline.rl.ppo_math`). `docs/ppo.md` has an example.
"""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from pipeline.models.classifiers import find_head
from pipeline.rl import ppo_math, ppo_metrics
from pipeline.rl.critic import Critic, CriticOptimizer, token_values
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.rewards import RewardModel
from pipeline.rl.value_model import build_value_model
from pipeline.training.frozen_weights import compute_in_float32, convert_frozen, share_frozen_weights


class PPOTrainer(GRPOTrainer):
    """Trainer for Proximal Policy Optimization (PPO) with a learned critic.

    Each rollout, of `generation_batch_size` completions, is sampled, scored and given advantages once, and then trained
    on `num_iterations` times, in optimizer steps of `per_device_train_batch_size x gradient_accumulation_steps x
    processes` completions. Policy and critic are two networks, each with its own optimizer, learning rate and gradient
    clipping, on the same schedule. In the first `value_warmup_steps` steps, the policy gets no gradients, so that
    neither its weights nor its optimizer state change.

    The score of a completion belongs to its last token. A completion that was cut off is scored as it stands, unless
    `missing_eos_penalty` or `mask_truncated_completions` is set. Nothing is learned from one without any score.

    Args:
        model: The policy. Its present state is also the reference. For a `PeftModel` with `peft_config`, the reference
            is the base model without the adapter; for one that has an adapter, a frozen copy of that adapter.
        value_model: The critic: a token classification model with one label, which is itself trained; a reward model or
            a causal language model, which is copied; or a path or Hub id of any of these. Default: a copy of the first
            reward model with a weight that has the policy's vocabulary and at least as many embeddings, otherwise of
            the policy. The head of a reward model is copied in the units of the score, times the weight, if that model
            is the only reward and is not normalised. Every other critic starts with estimates of 0.
        value_use_peft: If the policy is an adapter, make the critic one as well, on the frozen weights it starts from.
        *others, **kwargs: Any other argument of `GRPOTrainer`. An optimizer in `optimizers` is the policy's.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *others: Any,
        value_model: str | PreTrainedModel | PeftModel | None = None,
        value_use_peft: bool = True,
        **kwargs: Any,
    ) -> None:
        args = args or PPOConfig()
        # Copied, because TRL modifies the list.
        rewards = list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
        # TRL only creates a reference if GRPO's loss has a KL term. PPO's loss has none.
        args.beta = args.kl_coef
        super().__init__(model, rewards, args, *others, **kwargs)
        self.beta = args.beta = 0.0
        # Compiled and wrapped models hide their class and the names of weights, which are needed here.
        bare = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        judges = [bare(judge.model) if isinstance(judge, RewardModel) else None for judge in self.reward_funcs]
        frozen = [judge for judge in judges if judge is not None]
        frozen += [] if self.ref_model is None else [bare(self.ref_model)]
        # Frozen weights, except heads and adapters, get `frozen_dtype`, and equal ones are in memory once.
        adapted = isinstance(self.model, PeftModel)
        for network in frozen if adapted or args.frozen_dtype == "bfloat16" else []:
            network.requires_grad_(False)
        if args.frozen_dtype == "bfloat16" or (args.frozen_dtype == "auto" and adapted and args.bf16):
            for network in (self.model, *frozen):
                convert_frozen(network, torch.bfloat16)
            for network in frozen:
                compute_in_float32(find_head(network)[1])
        share_frozen_weights(self.model, frozen)
        critic = build_value_model(
            value_model,
            policy=self.model,
            tokenizer=self._tokenizer,
            rewards=list(zip(judges, self.reward_processing_classes, self.reward_weights.tolist(), strict=True)),
            args=args,
            use_peft=value_use_peft,
        ).to(self.accelerator.device)
        self.critic = Critic(critic, self.model, self.accelerator, args.max_grad_norm)
        self.parts += [self.critic, CriticOptimizer(self.critic, args)]
        # Moments of all scores so far, for `reward_normalization="running"`.
        self.score_moments = ppo_math.Moments()
        self._averages = ppo_metrics.Averages()
        self._sum_over_processes = partial(self.accelerator.reduce, reduction="sum")

    @property
    def value_model(self) -> Any:
        """The critic's model, wrapped as the policy is."""
        return self.critic.model

    # ---- The rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let the parent class sample and score, then replace its advantages (B,) by PPO's (B, T)."""
        args, mode = self.args, "train" if self.model.training else "eval"
        # If it is above 0, TRL computes `ref_per_token_logps`.
        self.beta = args.kl_coef
        batch = super()._generate_and_score_completions(inputs)
        self.beta = 0.0
        # PPO does not compare the completions of a prompt.
        self._metrics[mode].pop("frac_reward_zero_std", None)
        ids, attention_mask, mask = _texts(batch)
        rows, length = mask.shape

        # Scores are normalised over all processes. A completion has none if none of its tokens is trained on.
        all_scores = (self.all_rewards * self.reward_weights.to(mask.device)).nansum(dim=1)
        all_scored = ~self.all_rewards.isnan().all(dim=1) & self.accelerator.gather(mask.any(dim=1))
        running = args.reward_normalization == "running"
        moments = self.score_moments if running else ppo_math.Moments()
        if args.reward_normalization == "batch" or (running and mode == "train"):
            moments.update(all_scores[all_scored])
        own = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        scores, scored = moments.normalize(all_scores[own]), all_scored[own]
        ended = ppo_math.ended(batch["completion_ids"], batch["completion_mask"], self.eos_token_ids)
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~ended
        scores = torch.where(scored, scores, 0.0)
        # Tokens of completions without a score are excluded, so that the loss is an average over the others.
        if not scored.all():
            mask = batch["tool_mask"] = mask * scored.unsqueeze(1).int()
        batch["num_items_in_batch"] = self._sum_over_processes(mask.sum())

        # Computed before the first update: later log ratios and clipping ranges are relative to these values.
        size = args.per_device_train_batch_size if mode == "train" else args.per_device_eval_batch_size
        with torch.no_grad():
            if "old_per_token_logps" not in batch:
                sampled = self._get_per_token_logps_and_entropies(self.model, ids, attention_mask, length, size)
                batch["old_per_token_logps"] = sampled[0]
            values = self._values(ids, attention_mask, length, size)
        logps, ref_logps = batch["old_per_token_logps"], batch.get("ref_per_token_logps")
        penalty = torch.zeros_like(logps)
        if ref_logps is not None:
            penalty = args.kl_coef * ppo_math.kl_estimate(logps, ref_logps, "k1")

        # Each token is rewarded by minus its KL penalty, and the last one by the score as well.
        rewards = ppo_math.token_rewards(scores, penalty, mask)
        advantages, returns = ppo_math.generalized_advantages(rewards, values, mask, args.gamma, args.lam)
        if args.value_lam is not None:
            _, returns = ppo_math.generalized_advantages(rewards, values, mask, args.gamma, args.value_lam)
        self._averages.add(scored, ppo_metrics.of_completions(scores, penalty, logps, ref_logps, ended, mask))
        self._averages.add(mask, ppo_metrics.of_estimates(returns, values))
        # The logged table of completions, at most one rollout, shows the mean advantage over each one's tokens.
        shown = self.accelerator.gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1)).tolist()
        for _ in shown[: len(self._logs["advantages"])]:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(shown)
        if args.whiten_advantages:
            advantages = ppo_math.masked_whiten(advantages, mask, self._sum_over_processes)
        return batch | {"advantages": advantages, "returns": returns, "old_values": values}

    def _values(self, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None = None) -> Tensor:
        """Return the critic's estimates (B, `length`), before each of the last `length` tokens is chosen."""
        self.value_model.train(self.model.training)
        return token_values(self.value_model, ids, attention_mask, length, batch_size, self.accelerator.autocast)

    # ---- The update

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of the policy, and the critic's in the same way."""
        # Call `Trainer`'s method on a shallow copy of the trainer with the critic's model and learning rate.
        twin = copy.copy(self)
        twin.args, twin.optimizer = copy.copy(self.args), self.critic.optimizer
        if self.args.value_learning_rate is not None:
            twin.args.learning_rate = self.args.value_learning_rate
        self.critic.optimizer = GRPOTrainer.create_optimizer(twin, self.critic.bare)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradients of a micro-batch in both networks, and step the critic after the last one.

        `Trainer` steps the policy afterwards.
        """
        last = self.accelerator.sync_gradients
        # Processes exchange gradients once per optimizer step.
        with nullcontext() if last else self.accelerator.no_sync(self.critic.model):
            loss = super().training_step(*args, **kwargs)
        if last:
            schedule: Any = self.lr_scheduler
            if isinstance(schedule, LambdaLR):
                share = schedule.lr_lambdas[0](schedule.last_epoch)
            else:
                # Schedules that follow evaluations have no such factor, so derive it from the policy's learning rate.
                share = self.optimizer.param_groups[0]["lr"] / self.args.learning_rate
            self._metrics["train"]["val/grad_norm"].append(self.critic.step(share))
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the clipped policy loss, which TRL computes from the advantages (B, T), plus the critic's loss.

        TRL's loss of a token is `-min(ratio * advantage, clip(ratio, 1 - cliprange, 1 + cliprange) * advantage)`.
        """
        # Without gradients, the policy's optimizer changes neither the policy nor its own state.
        trains_policy = self.state.global_step >= self.args.value_warmup_steps
        ids, attention_mask, mask = _texts(inputs)
        values = self._values(ids, attention_mask, mask.shape[1])
        old_values, returns = inputs["old_values"], inputs["returns"]
        value_losses, clipped = ppo_math.clipped_value_loss(values, old_values, returns, self.args.cliprange_value)
        # As TRL normalises loss_type="dapo": by the mean number of tokens in an optimizer step, per process.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        value_loss = self.args.vf_coef * ((value_losses * mask).sum() / tokens)
        if self.model.training and trains_policy:
            # Immediately, so that only one network has activations in memory at a time.
            self.accelerator.backward(value_loss)
            value_loss = value_loss.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_policy):
            policy_loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        log_ratio = self.latest_logps - inputs["old_per_token_logps"]
        self._averages.add(mask, ppo_metrics.of_update(log_ratio, value_losses.detach(), clipped))
        if self.model.training and self.accelerator.sync_gradients:
            self._log_averages()
        return policy_loss + value_loss

    def end(self) -> None:
        """Also unwrap the critic, whose wrapper refers to the process group that ends here."""
        self.critic.model = self.critic.bare
        super().end()

    def _log_averages(self) -> None:
        for name, value in self._averages.take(self._sum_over_processes).items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)


def _texts(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and attention mask (B, L) of whole texts, and the mask of the completions as in `ppo_math`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention_mask, batch["completion_mask"] * batch.get("tool_mask", 1)
