"""PPO for language models, on the engine of TRL's `GRPOTrainer`.

TRL removed its `PPOTrainer` after 1.12. This one adds the critic, the KL penalty per token inside the reward,
generalised advantage estimation and the clipped value loss (`pipeline.rl.ppo_math`). `docs/ppo.md` has an example, and
walks through one rollout, from file to file.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from trl.trainer.utils import use_adapter

from pipeline.models.classifiers import find_head
from pipeline.rl import ppo_math, ppo_metrics
from pipeline.rl.critic import Critic, CriticOptimizer, token_values
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.rl.rewards import RewardModel
from pipeline.rl.value_model import build_value_model
from pipeline.training.frozen_weights import compute_in_float32, convert_frozen, share_frozen_weights

Batch = dict[str, Any]
"""A rollout of one process, or a micro-batch of it: B completions of up to T tokens, after prompts of up to P.

TRL's trainer makes `prompt_ids` and `prompt_mask` (B, P), padded on the left; `completion_ids` and `completion_mask`
(B, T), padded on the right; with tools, `tool_mask` (B, T), 0 for what a tool wrote. PPO adds `old_per_token_logps`,
`advantages`, `returns` and `old_values`, with a reference also `ref_per_token_logps`, all (B, T). `num_items_in_batch`
is the number of tokens, of all processes, that the whole rollout trains on.
"""


class PPOTrainer(GRPOTrainer):
    """Trainer for Proximal Policy Optimization (PPO) with a learned critic.

    Each rollout, of `generation_batch_size` completions, is sampled, scored and given advantages once, and then trained
    on `num_iterations` times, in optimizer steps of `per_device_train_batch_size x gradient_accumulation_steps x
    processes` completions. Policy and critic are two networks, each with its own optimizer, learning rate and gradient
    clipping, on the same schedule. In the first `value_warmup_steps` steps, the policy gets no gradients, so that
    neither its weights nor its optimizer state change.

    The score of a completion belongs to its last token. A completion that was cut off is scored as it stands, unless
    `missing_eos_penalty` or `mask_truncated_completions` is set. Nothing is learned from one without any score.

    A subclass can override what happens to a rollout once it is sampled, one step at a time: `score_completions`,
    `compute_log_probs`, `token_rewards`, `estimate_advantages` and `policy_loss`. With this one, short answers score
    higher:

        class BriefPPOTrainer(PPOTrainer):
            def score_completions(self, batch):
                scores = super().score_completions(batch)
                length = batch["completion_mask"].sum(1)
                return dataclasses.replace(scores, rewards=scores.rewards - 0.01 * length)

    Guarded by `tests/rl/test_ppo.py` (what is learned), `tests/rl/test_ppo_resume.py` (a resumed run has the same bits)
    and `tests/recipes/test_ppo_recipe.py` (two processes train as one does).

    Args:
        model: The policy. Its present state is also the reference. For a `PeftModel` with `peft_config`, the reference
            is the base model without the adapter; for one that has an adapter, a frozen copy of that adapter.
        value_model: The critic: a token classification model with one label, which is itself trained; a reward model or
            a causal language model, which is copied; or a path or Hub id of any of these. Default: a copy of the first
            reward model with a weight that has the policy's vocabulary and at least as many embeddings, otherwise of
            the policy. The head of a reward model is copied in the units of the score, times the weight, if that model
            is the only reward and is not normalised. Every other critic starts with estimates of 0.
        value_use_peft: If the policy is an adapter, make the critic one as well, on the frozen weights it starts from.
        *arguments, **kwargs: Any other argument of `GRPOTrainer`. An optimizer in `optimizers` is the policy's.

    Attributes:
        critic: The critic and its optimizer.
        score_moments: Moments of all scores so far, for `reward_normalization: running`.
        latest_rewards: What the tokens of the latest rollout were paid, as `token_rewards` returned it; None before the
            first one.
    """

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"
    _paper: ClassVar = {"title": "Fine-Tuning Language Models from Human Preferences", "id": "1909.08593"}

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *arguments: Any,
        value_model: str | PreTrainedModel | PeftModel | None = None,
        value_use_peft: bool = True,
        **kwargs: Any,
    ) -> None:
        args = args or PPOConfig()
        # Copied, because TRL modifies the list.
        rewards = list(reward_funcs) if isinstance(reward_funcs, list) else reward_funcs
        super().__init__(model, rewards, args, *arguments, **kwargs)
        # The models of the rewards; None for a function.
        judges: list[Any] = []
        for reward in self.reward_funcs:
            judges.append(self._bare(reward.model) if isinstance(reward, RewardModel) else None)
        self._share_frozen_weights(judges)
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
        self.score_moments = ppo_math.Moments()
        self.latest_rewards: ppo_math.Rewards | None = None
        self._averages = ppo_metrics.Averages()
        self._sum_over_processes = partial(self.accelerator.reduce, reduction="sum")

    def kl_weight(self, args: PPOConfig) -> float:
        """Return the weight of the KL to the reference, which is a part of the rewards; 0 for no reference."""
        return args.kl_coef

    def _bare(self, model: nn.Module) -> Any:
        """Return a model without the wrappers that hide its class and the names of its weights."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _share_frozen_weights(self, judges: Sequence[nn.Module | None]) -> None:
        """Convert frozen weights to `frozen_dtype`, except heads and adapters, and keep equal ones in memory once.

        `judges` are the models of the rewards, None for a function. Besides them, the reference is frozen and, under an
        adapter, the weights of the policy.
        """
        frozen = [judge for judge in judges if judge is not None]
        if self.ref_model is not None:
            frozen.append(self._bare(self.ref_model))
        dtype = self.args.frozen_dtype
        is_adapter = isinstance(self.model, PeftModel)
        if is_adapter or dtype == "bfloat16":
            for network in frozen:
                network.requires_grad_(False)
        if dtype == "bfloat16" or (dtype == "auto" and is_adapter and self.args.bf16):
            for network in (self.model, *frozen):
                convert_frozen(network, torch.bfloat16)
            for network in frozen:
                _, head = find_head(network)
                compute_in_float32(head)
        share_frozen_weights(self.model, frozen)

    @property
    def value_model(self) -> Any:
        """The critic's model, wrapped as the policy is."""
        return self.critic.model

    # ---- The rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        """Let the parent class sample and reward, then replace its advantages (B,) by PPO's (B, T)."""
        mode = "train" if self.model.training else "eval"
        batch: Batch = super()._generate_and_score_completions(inputs)
        # PPO does not compare the completions of a prompt.
        self._metrics[mode].pop("frac_reward_zero_std", None)

        scores = self.score_completions(batch)
        _, _, mask = _texts(batch)
        # Tokens of completions without a score are excluded, so that the loss is an average over the others.
        if not scores.scored.all():
            mask = batch["tool_mask"] = mask * scores.scored.unsqueeze(1).int()
        # TRL has counted the tokens of all completions.
        batch["num_items_in_batch"] = self._sum_over_processes(mask.sum())

        batch |= self.compute_log_probs(batch)
        rewards = self.latest_rewards = self.token_rewards(batch, scores)
        batch |= self.estimate_advantages(batch, rewards)
        self._log_rollout(batch, rewards)
        if self.args.whiten_advantages:
            batch["advantages"] = ppo_math.masked_whiten(batch["advantages"], mask, self._sum_over_processes)
        return batch

    def score_completions(self, batch: Batch) -> ppo_math.Scores:
        """Return the scores of this process's completions, from the rewards that all processes have gathered.

        A completion has no score if every reward function with a weight returned None, or if none of its tokens is
        trained on (`mask_truncated_completions`).
        """
        args = self.args
        _, _, mask = _texts(batch)
        # `all_rewards`, (completions, rewards), are of all processes, because their scores are normalised together.
        all_scores = (self.all_rewards * self.reward_weights.to(mask.device)).nansum(dim=1)
        all_scored = ~self.all_rewards.isnan().all(dim=1) & self.accelerator.gather(mask.any(dim=1))
        is_running = args.reward_normalization == "running"
        moments = self.score_moments if is_running else ppo_math.Moments()
        if args.reward_normalization == "batch" or (is_running and self.model.training):
            moments.update(all_scores[all_scored])
        # The rows of this process among those of all processes.
        first_row = self.accelerator.process_index * len(mask)
        of_process = slice(first_row, first_row + len(mask))

        ended = ppo_math.ended(batch["completion_ids"], batch["completion_mask"], self.eos_token_ids)
        return ppo_math.Scores(
            rewards=moments.normalize(all_scores[of_process]),
            missing_end=(args.missing_eos_penalty or 0.0) * ~ended,
            ended=ended,
            scored=all_scored[of_process],
        )

    @torch.no_grad()
    def compute_log_probs(self, batch: Batch) -> Batch:
        """Return `old_per_token_logps` and, with a reference, `ref_per_token_logps`, both (B, T), in nats.

        They are computed before the first update: log ratios, clipping and KL are relative to the policy that sampled.
        """
        ids, attention_mask, mask = _texts(batch)
        text = (ids, attention_mask, mask.shape[1], self._pass_size())
        # TRL has computed them if it needs them as well.
        logps = batch.get("old_per_token_logps")
        if logps is None:
            logps, _, _ = self._get_per_token_logps_and_entropies(self.model, *text)
        if self.args.kl_coef == 0:
            return {"old_per_token_logps": logps}
        if self.ref_model is not None:
            ref_logps, _, _ = self._get_per_token_logps_and_entropies(self.ref_model, *text)
        else:
            # The reference of an adapter is the copy of it that TRL has made, or else the model without adapters.
            policy = self.accelerator.unwrap_model(self.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                ref_logps, _, _ = self._get_per_token_logps_and_entropies(self.model, *text)
        return {"old_per_token_logps": logps, "ref_per_token_logps": ref_logps}

    def token_rewards(self, batch: Batch, scores: ppo_math.Scores) -> ppo_math.Rewards:
        """Return what each token is paid: minus its KL penalty, and for the last one the score as well.

        Everything that shows or measures rewards reads them from here: the metrics, and the page of `fourstage app`.
        """
        _, _, mask = _texts(batch)
        logps = batch["old_per_token_logps"]
        ref_logps = batch.get("ref_per_token_logps")
        kl = None
        penalty = torch.zeros_like(logps)
        if ref_logps is not None:
            kl = ppo_math.kl_estimate(logps, ref_logps, "k1") * mask
            penalty = self.args.kl_coef * kl
        tokens = ppo_math.token_rewards(scores.total, penalty, mask)
        return ppo_math.Rewards(scores, kl, penalty, tokens)

    @torch.no_grad()
    def estimate_advantages(self, batch: Batch, rewards: ppo_math.Rewards) -> Batch:
        """Return `advantages`, `returns`, which the critic learns, and its `old_values`, all (B, T).

        If `whiten_advantages` is set, the advantages are whitened afterwards.
        """
        args = self.args
        ids, attention_mask, mask = _texts(batch)
        values = self._values(ids, attention_mask, mask.shape[1], self._pass_size())
        advantages, returns = ppo_math.generalized_advantages(rewards.tokens, values, mask, args.gamma, args.lam)
        if args.value_lam is not None:
            _, returns = ppo_math.generalized_advantages(rewards.tokens, values, mask, args.gamma, args.value_lam)
        return {"advantages": advantages, "returns": returns, "old_values": values}

    def _pass_size(self) -> int:
        """Return how many completions go through a model at once when nothing is learned from them."""
        args = self.args
        return args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size

    def _values(self, ids: Tensor, attention_mask: Tensor, length: int, batch_size: int | None = None) -> Tensor:
        """Return the critic's estimates (B, `length`), before each of the last `length` tokens is chosen."""
        self.value_model.train(self.model.training)
        return token_values(self.value_model, ids, attention_mask, length, batch_size, self.accelerator.autocast)

    def _log_rollout(self, batch: Batch, rewards: ppo_math.Rewards) -> None:
        """Add a rollout to the metrics, and its advantages, before whitening, to TRL's table of completions."""
        _, _, mask = _texts(batch)
        logps = batch["old_per_token_logps"]
        ref_logps = batch.get("ref_per_token_logps")
        self._averages.add(rewards.scores.scored, ppo_metrics.of_completions(rewards, logps, ref_logps, mask))
        self._averages.add(mask, ppo_metrics.of_estimates(batch["returns"], batch["old_values"]))
        # TRL has added its own advantages to the table, which has at most one rollout. Replace them by the mean over
        # each completion's tokens.
        means = (batch["advantages"] * mask).sum(1) / mask.sum(1).clamp(min=1)
        advantages = self.accelerator.gather(means).tolist()
        for _ in advantages[: len(self._logs["advantages"])]:
            self._logs["advantages"].pop()
        self._logs["advantages"].extend(advantages)

    # ---- The update

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer of the policy, and the critic's in the same way."""
        # `Trainer`'s method makes the optimizer of a trainer's own model, so it is called on a shallow copy of this
        # trainer, which has the critic's model and learning rate.
        twin = copy.copy(self)
        twin.args = copy.copy(self.args)
        twin.optimizer = self.critic.optimizer
        if self.args.value_learning_rate is not None:
            twin.args.learning_rate = self.args.value_learning_rate
        self.critic.optimizer = GRPOTrainer.create_optimizer(twin, self.critic.bare)
        return super().create_optimizer(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradients of a micro-batch in both networks, and step the critic after the last one.

        `Trainer` steps the policy afterwards.
        """
        is_last = self.accelerator.sync_gradients
        # Processes exchange gradients once per optimizer step.
        with nullcontext() if is_last else self.accelerator.no_sync(self.critic.model):
            loss = super().training_step(*args, **kwargs)
        if is_last:
            self._metrics["train"]["val/grad_norm"].append(self.critic.step(self._share_of_peak_rate()))
        return loss

    def _share_of_peak_rate(self) -> float:
        """Return the present learning rate as a share of the peak, by the schedule of policy and critic."""
        schedule: Any = self.lr_scheduler
        if isinstance(schedule, LambdaLR):
            return schedule.lr_lambdas[0](schedule.last_epoch)
        # Schedules that follow evaluations have no such factor, so derive it from the policy's learning rate.
        return self.optimizer.param_groups[0]["lr"] / self.args.learning_rate

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of the policy plus the critic's."""
        # Without gradients, the policy's optimizer changes neither the policy nor its own state.
        trains_policy = self.state.global_step >= self.args.value_warmup_steps
        ids, attention_mask, mask = _texts(inputs)
        values = self._values(ids, attention_mask, mask.shape[1])
        value_losses, clipped = ppo_math.clipped_value_loss(
            values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )
        value_loss = self.args.vf_coef * self.mean_over_tokens(value_losses, inputs)
        if self.model.training and trains_policy:
            # Backpropagate now, so that only one network has activations in memory at a time.
            self.accelerator.backward(value_loss)
            value_loss = value_loss.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_policy):
            policy_loss = self.policy_loss(model, inputs)
        log_ratio = self.latest_logps - inputs["old_per_token_logps"]
        self._averages.add(mask, ppo_metrics.of_update(log_ratio, value_losses.detach(), clipped))
        if self.model.training and self.accelerator.sync_gradients:
            self._log_averages()
        return policy_loss + value_loss

    def policy_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the clipped loss of the policy, which TRL computes from the advantages (B, T).

        The loss of a token is `-min(ratio * advantage, clip(ratio, 1 - cliprange, 1 + cliprange) * advantage)`, and
        `mean_over_tokens` averages it. A subclass can add terms, such as an entropy (`learns_from_entropy`).
        """
        loss: Tensor = super().compute_loss(model, batch)
        return loss

    def mean_over_tokens(self, values: Tensor, batch: Batch) -> Tensor:
        """Return what values (B, T) of the tokens of a micro-batch add to the loss of an optimizer step.

        Their sum is divided as TRL divides the policy's loss (`loss_type="dapo"`): by the mean number of tokens of an
        optimizer step, per process. So each token of a rollout has the same weight.
        """
        _, _, mask = _texts(batch)
        divisor = batch["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            divisor = divisor * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return (values * mask).sum() / divisor

    def end(self) -> None:
        """Also unwrap the critic, whose wrapper refers to the process group that ends here."""
        self.critic.model = self.critic.bare
        super().end()

    def _log_averages(self) -> None:
        """Add the metrics of PPO since they were logged last, over all processes."""
        mode = "train" if self.model.training else "eval"
        for name, value in self._averages.take(self._sum_over_processes).items():
            self._metrics[mode][name].append(value)


def _texts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and attention mask (B, P + T) of prompts with completions, and the mask (B, T) of `ppo_math`."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    return ids, attention_mask, batch["completion_mask"] * batch.get("tool_mask", 1)
