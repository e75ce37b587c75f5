"""The configuration of `pipeline.rl.ppo.PPOTrainer`."""

import os
from dataclasses import dataclass, fields

from trl import GRPOConfig

from pipeline import hardware, launch
from pipeline.config.checks import UNUSED_IN_ROLLOUTS, check_ranges, check_unused, for_each_name
from pipeline.data.arguments import option
from pipeline.errors import Problem, refuse_values

# accelerate shards one model with its optimizer, but PPO trains two: see `recipes/accelerate/README.md`.
NOT_SHARDED = "policy and critic cannot be sharded, use DDP, and use_peft for models of 1B parameters and more"
# Options of `GRPOConfig` that PPO does not use, and why; it refuses any value but their default.
UNUSED = UNUSED_IN_ROLLOUTS | for_each_name(
    {
        "beta use_bias_correction_kl": "PPO's KL penalty is part of the reward, set kl_coef",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": "PPO's reference does not change",
        "epsilon_high": "PPO clips on both sides alike, set cliprange",
        "scale_rewards": "PPO's advantages are not relative to a group, see whiten_advantages",
        "loss_type importance_sampling_level multi_objective_aggregation": "PPO has one loss",
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_k_neg": "PPO has one loss",
        "vespo_lambda_pos vespo_lambda_neg": "PPO has one loss",
        "fsdp fsdp_config deepspeed": NOT_SHARDED,
    }
)


@dataclass
class PPOConfig(GRPOConfig):
    """Configuration of `PPOTrainer`: `GRPOConfig` and the fields below, each described by its `help`.

    Some fields of `GRPOConfig` differ in meaning or default. `disable_dropout` is True: with dropout, a token's
    probability ratio is not 1 before the first update. `epsilon` is `cliprange`. `loss_type` stays "dapo": the sum over
    the tokens of an optimizer step, divided by the mean number of tokens per step in its rollout, however it is split
    over processes and accumulation. Fields without effect on PPO (`UNUSED`) must keep their default. Precision and
    device suit the machine unless they are set.
    """

    num_generations: int | None = option(1, "Completions sampled for each prompt; they are not compared.")
    num_generations_eval: int | None = option(None, "The same in evaluation. Default: `num_generations`.")
    num_iterations: int = option(4, "PPO epochs over each rollout.")
    disable_dropout: bool = option(True, "Train policy and critic without dropout.")
    kl_coef: float = option(0.05, "Reward subtracted at each token per nat of KL; 0 means no reference.")
    gamma: float = option(1.0, "Discount per token, in [0, 1].")
    lam: float = option(0.95, "Lambda of generalised advantage estimation, in [0, 1].")
    value_lam: float | None = option(None, "Lambda of the returns that the critic learns. Default: `lam`.")
    cliprange: float = option(0.2, "How far a token's probability ratio may move from 1 in the updates of a rollout.")
    cliprange_value: float = option(0.2, "How far the critic's estimate may move per rollout, in units of the reward.")
    vf_coef: float = option(0.1, "Weight of the value loss relative to the policy loss.")
    value_learning_rate: float | None = option(None, "Peak learning rate of the critic. Default: `learning_rate`.")
    value_warmup_steps: int = option(0, "Number of initial steps in which only the critic is trained.")
    frozen_dtype: str = option(
        "auto",
        "Dtype of the weights that are not trained: float32 keeps the dtype they were loaded in; bfloat16; auto "
        "(bfloat16 for an adapter's base if training is in bf16, else float32). Heads and adapters stay as they are.",
        choices=["auto", "bfloat16", "float32"],
    )
    whiten_advantages: bool = option(True, "Shift and scale the advantages of a rollout to mean 0 and variance 1.")
    reward_normalization: str = option(
        "none",
        "Normalise the sum of all rewards, before `missing_eos_penalty` and KL, by mean and standard deviation: none; "
        "batch (of its rollout); running (of all rollouts so far, which checkpoints contain).",
        choices=["none", "batch", "running"],
    )
    missing_eos_penalty: float | None = option(None, "Subtracted from the score if a completion has no end of turn.")

    def __post_init__(self) -> None:
        rows = self._rows()
        refuse_values(*self._problems(rows))

        # Choose precision and device for this machine unless they are set, as the recipes do.
        if self.use_cpu and hardware.accelerator() is not None:
            hardware.keep_to_cpu()
        is_precision_unset = self.bf16 is None and not self.fp16
        for name, choice in hardware.training_defaults().items():
            if name in ("bf16", "fp16"):
                is_unset = is_precision_unset
            else:
                is_unset = name in ("use_cpu", "ddp_backend") and not getattr(self, name)
            if is_unset:
                setattr(self, name, choice.value)
        self.epsilon = self.cliprange
        num_generations = self.num_generations
        num_generations_eval = self.num_generations_eval
        if self.num_generations == 1:
            # TRL's check demands two or more to compare, and PPO compares none. A group of all rows passes that check.
            self.num_generations = rows
            self.num_generations_eval = self.num_generations_eval or 1
        try:
            super().__post_init__()
        finally:
            self.num_generations = num_generations
            self.num_generations_eval = num_generations_eval

    def _rows(self) -> int:
        """Return the number of completions in a rollout of all processes."""
        if self.generation_batch_size:
            return self.generation_batch_size
        # There is no process group yet. Before a launch, `config.parser.check_values` sets the number of processes.
        processes = vars(type(self)).get("world_size", int(os.environ.get("WORLD_SIZE", "1")))
        micro_batches = self.steps_per_generation or self.gradient_accumulation_steps
        return self.per_device_train_batch_size * micro_batches * processes

    def _problems(self, rows: int) -> list[Problem]:
        """Return what is wrong with the values of PPO's fields, and with those that it shares with GRPO.

        `rows` is the number of completions in a rollout.
        """
        # The fields that this class defines. Others are checked by TRL and transformers.
        ppo_fields = {item.name: item for item in fields(self) if item.name in PPOConfig.__annotations__}
        values = {name: getattr(self, name) for name in ppo_fields}
        problems = check_ranges(values) + check_unused(vars(self), PPOConfig, UNUSED)
        for name, item in ppo_fields.items():
            choices = item.metadata.get("choices")
            if choices and values[name] not in choices:
                problems.append(Problem(name, values[name], f"must be {' or '.join(choices)}"))
        if self.trust_remote_code:
            remedy = "load the policy yourself, and pass it with a value_model and a tokenizer"
            problems.append(Problem("trust_remote_code", True, f"code from the Hub is never run here: {remedy}"))
        # A configuration that is made from another one has `cliprange` here.
        if vars(self)["epsilon"] not in (GRPOConfig.epsilon, self.cliprange):
            problems.append(Problem("epsilon", self.epsilon, "must be unset: set cliprange"))
        if self.num_generations == 1 and rows == 1:
            name = "generation_batch_size" if self.generation_batch_size else "per_device_train_batch_size"
            remedy = "makes rollouts of a single completion; raise it to 2 or more"
            problems.append(Problem(name, getattr(self, name), remedy))
        for name in filter(launch.is_sharded_by, launch.SHARDING):
            problems.append(Problem("distributed_type", name, NOT_SHARDED))
        return problems
