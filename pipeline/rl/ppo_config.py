"""What `pipeline.rl.ppo.PPOTrainer` can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from pipeline.config.checks import check_ranges
from pipeline.errors import Problem, UserError

GRPO_LOSS = {
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
}
"""Options of `GRPOConfig`'s loss that PPO is not defined with other values of."""


@dataclass
class PPOConfig(GRPOConfig):
    """What `PPOTrainer` can be told: all that `GRPOConfig` can, and the following.

    Some fields of `GRPOConfig` have another meaning or default: `num_generations` is how many completions are
    sampled for each prompt (1; they are not compared with each other), `num_iterations` how many PPO epochs
    are made over them (4). The advantage is no longer relative to a group, so `scale_rewards` has no effect.
    `disable_dropout` is True: with dropout, a token's probability ratio is not 1 before the first update.
    `loss_type` stays "dapo": the sum over the real tokens of an optimizer step, by how many such a step has on
    average in its rollout, however it is split over processes and accumulation.

    Args:
        kl_coef: Reward taken away for each nat by which the policy leaves the reference, at each token. 0
            makes do without a reference model, and without `objective/kl`.
        kl_estimator: "k1" (the log ratio) or "k3" (never negative, less variance). Both are unbiased.
        gamma: Discount per token, in [0, 1].
        lam: Lambda of generalised advantage estimation, in [0, 1].
        cliprange: How far the probability ratio of a token may move from 1 in the updates of one rollout; it
            takes the place of `epsilon`.
        cliprange_value: How far the critic's estimate of a token may move in the updates of one rollout, in
            units of the (normalised) reward.
        vf_coef: Weight of the value loss beside the policy loss.
        value_learning_rate: Peak learning rate of the critic, on the schedule of the policy's. None:
            `learning_rate`.
        whiten_advantages: Give the advantages of each rollout, over all processes, mean 0 and variance 1.
        reward_normalization: "none"; "batch": each score less the mean of its rollout, over its standard
            deviation; "running": by mean and standard deviation of all scores since training began, over all
            processes, which are saved with each checkpoint. It applies to the sum of all rewards, before
            `missing_eos_penalty` and KL.
        missing_eos_penalty: Taken from the score of a completion cut off before its end of turn, after
            normalisation.
            None: nothing. (`mask_truncated_completions` leaves such completions out altogether.)

    Raises:
        ValueError: For a value out of range, a generation batch of a single completion, or an option of
            `GRPOConfig` that contradicts PPO.
    """

    num_generations: int | None = field(default=1, metadata={"help": "Completions sampled for each prompt."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "The same in evaluation. Default: `num_generations`."}
    )
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over each rollout."})
    disable_dropout: bool = field(default=True, metadata={"help": "Train policy and critic without dropout."})
    kl_coef: float = field(default=0.05, metadata={"help": "Reward taken away for each nat of KL, at each token."})
    kl_estimator: str = field(
        default="k1", metadata={"help": "Estimator of the KL at a token.", "choices": ["k1", "k3"]}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of the policy's probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip range of the critic's estimates."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    value_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic. Default: that of the policy."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Whiten the advantages of each rollout over all processes."}
    )
    reward_normalization: str = field(
        default="none",
        metadata={
            "help": "Normalise scores by nothing, by their rollout, or by all scores so far.",
            "choices": ["none", "batch", "running"],
        },
    )
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "Taken from the score of a completion without end of turn."}
    )

    def __post_init__(self) -> None:
        self._check()
        self.epsilon = self.cliprange
        given = self.num_generations, self.num_generations_eval
        if self.num_generations == 1:
            # GRPO compares two or more; PPO need not. Any divisor of the generation batch passes its check.
            self.num_generations, self.num_generations_eval = self._rollout_rows(), given[1] or 1
        try:
            super().__post_init__()
        finally:
            self.num_generations, self.num_generations_eval = given

    def _rollout_rows(self) -> int:
        """Completions in a rollout, over all processes."""
        accumulated = self.steps_per_generation or self.gradient_accumulation_steps
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return self.generation_batch_size or self.per_device_train_batch_size * accumulated * processes

    def _check(self) -> None:
        """Raise `ValueError` for every field that is wrong, all in one message."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name in PPOConfig.__annotations__}
        wrong = check_ranges(own)
        if self.num_generations == 1 and self._rollout_rows() == 1:
            field = "generation_batch_size" if self.generation_batch_size else "per_device_train_batch_size"
            wrong.append(Problem(field, 1, "makes rollouts of a single completion; raise it to 2 or more"))
        if self.num_generations is None:
            wrong.append(Problem("num_generations", None, "must be given"))
        if self.kl_estimator not in ("k1", "k3"):
            wrong.append(Problem("kl_estimator", self.kl_estimator, "must be k1 or k3"))
        if self.reward_normalization not in ("none", "batch", "running"):
            remedy = "must be none, batch or running"
            wrong.append(Problem("reward_normalization", self.reward_normalization, remedy))
        if self.beta != 0.0:
            wrong.append(Problem("beta", self.beta, "must be 0: PPO's KL penalty is part of the reward, set kl_coef"))
        if self.sync_ref_model:
            wrong.append(Problem("sync_ref_model", True, "must be False: PPO's reference stays what it is"))
        if self.epsilon not in (GRPOConfig.epsilon, self.cliprange):
            wrong.append(Problem("epsilon", self.epsilon, "must be unset: set cliprange"))
        if self.epsilon_high is not None:
            wrong.append(Problem("epsilon_high", self.epsilon_high, "must be unset: set cliprange"))
        for name, default in GRPO_LOSS.items():
            if (value := getattr(self, name)) != default:
                wrong.append(Problem(name, value, f"must be {default}, its default"))
        if wrong:
            problems = UserError(*wrong)
            raise ValueError(str(problems)) from problems
