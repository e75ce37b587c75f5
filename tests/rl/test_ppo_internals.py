"""What `pipeline.rl.ppo` and `pipeline.rl.grpo`, which it builds on, take for granted of TRL and transformers without
their promise.

A failure here says which of their internals moved, and what `PPOTrainer` did with it; the other tests of PPO
and GRPO then show what that broke.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model, use_adapter

from pipeline.rl.ppo import PPOTrainer
from tests import ppo_toy as toy

# What is called or overridden: its parameters, and what for.
PARAMETERS: dict[Any, tuple[list[str], str]] = {
    GRPOTrainer._generate_and_score_completions: (
        ["self", "inputs"],
        "PPO replaces the advantages it returns",
    ),
    GRPOTrainer._calculate_rewards: (
        ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "PPO keeps the rewards that it returns, gathered over processes; those without a weight are left out",
    ),
    GRPOTrainer._compute_loss: (["self", "model", "inputs"], "PPO adds the value loss to what it returns"),
    GRPOTrainer._get_train_sampler: (["self", "dataset"], "PPO wraps the sampler it returns"),
    GRPOTrainer._prepare_inputs: (
        ["self", "generation_batch"],
        "it fills `_buffered_inputs`, which PPO saves",
    ),
    GRPOTrainer.training_step: (
        ["self", "model", "inputs", "num_items_in_batch"],
        "PPO zeroes the critic in it",
    ),
    Trainer.create_optimizer: (["self", "model"], "PPO adds the critic's parameters"),
    Trainer.evaluation_loop: (None, "PPO forks the random numbers around it, and adds to the metrics it returns"),
    Trainer._push_from_checkpoint: (["self", "checkpoint_folder"], "PPO adds the critic to what is pushed"),
    AuxiliaryTrainingWrapper.unload_and_optionally_merge_module: (
        ["self", "merge", "safe_merge", "adapter_names"],
        "PPO's critic is a copy with adapters merged",
    ),
    Trainer._clip_grad_norm: (["self", "model"], "PPO clips the critic there"),
    Trainer._save: (["self", "output_dir", "state_dict"], "PPO saves the critic there"),
    Trainer._load_from_checkpoint: (
        ["self", "resume_from_checkpoint", "model"],
        "PPO loads the critic there",
    ),
    Trainer._load_best_model: (["self"], "PPO loads the critic there"),
    Trainer._save_optimizer_and_scheduler: (["self", "output_dir"], "PPO saves the rollout there"),
    GRPOTrainer._load_optimizer_and_scheduler: (["self", "checkpoint"], "PPO loads the rollout there"),
    add_fused_lm_head: (
        ["model", "temperature", "cast_lm_head_to_fp32", "outputs"],
        "PPO gives the reference its head",
    ),
    disable_dropout_in_model: (["model"], "PPO calls it on the critic"),
    use_adapter: (["model", "adapter_name"], "PPO finds the reference of an adapter with it"),
}

# What the source must say: in it, a piece of it, and what for.
SOURCES: list[tuple[Any, str, str]] = [
    (GRPOTrainer._compute_loss, "if advantages.dim() == 1:", "advantages may be (B, T)"),
    (
        GRPOTrainer._compute_loss,
        'inputs.get("old_per_token_logps")',
        "log-probabilities of the rollout are used",
    ),
    (
        GRPOTrainer._compute_loss,
        'completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]',
        "PPO masks unscored completions with it",
    ),
    (
        GRPOTrainer._compute_loss,
        'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        "PPO's value loss is normalised as the policy loss is",
    ),
    (
        GRPOTrainer._compute_loss,
        "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
        "PPO's value loss is normalised as the policy loss is",
    ),
    (
        GRPOTrainer._get_per_token_logps_and_entropies,
        "return logps, entropies, aux_loss",
        "PPO measures KL, ratio and entropy with them",
    ),
    (
        GRPOTrainer._prepare_inputs,
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "a restored rollout is trained on, not sampled again",
    ),
    (
        GRPOTrainer._prepare_inputs,
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "PPO restores `_step` with it",
    ),
    (
        GRPOTrainer._calculate_rewards,
        "rewards_per_func = gather(rewards_per_func)",
        "PPO slices them by process",
    ),
    (GRPOTrainer.log, "self._metrics[mode].items()", "means of an evaluation are taken out of them, weighted"),
    (Trainer._run_epoch, "model.zero_grad()", "the trainer zeroes the policy only, so PPO zeroes the critic"),
    (
        Trainer._run_epoch,
        "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)",
        "PPO reduces the critic's gradients when `sync_gradients` says so",
    ),
    (Trainer.train, "_load_from_checkpoint(", "the critic is loaded when a run is resumed"),
    (
        Trainer._prepare_for_training,
        "_load_optimizer_and_scheduler(",
        "the rollout is loaded when a run is resumed",
    ),
    (Trainer._save_checkpoint, "_save_optimizer_and_scheduler(", "the rollout is part of a checkpoint"),
    (GRPOConfig.__post_init__, "if self.num_generations < 2:", "the check that PPOConfig steps around"),
]

# What a trainer and its parts must have, and what for.
ATTRIBUTES = {
    "_step": "the place in the rollout, saved and restored",
    "_buffered_inputs": "the rollout, saved and restored",
    "_metrics": "PPO's metrics are added to it",
    "_logs": "PPO's advantages are shown in it",
    "_tokenizer": "its vocabulary is compared with the reward model's",
    "_is_vlm": "PPO refuses models that see",
    "eos_token_ids": "PPO counts completions that ended",
    "reward_funcs": "the critic is made from the first",
    "reward_processing_classes": "their vocabularies are compared with the policy's",
    "reward_weights": "PPO's score is the weighted sum",
    "ref_model": "None as long as beta is 0; PPO puts its own there",
    "temperature": "the reference samples by it",
    "num_iterations": "PPO epochs",
    "_entropy_bonus_enabled": "entropies have gradients if it is set",
    "accelerator": "PPO reduces over processes with it",
}


def moved(what: str, why: str) -> str:
    return (
        f"{what} is not as pipeline.rl.ppo and pipeline.rl.grpo expect ({why}). TRL {trl.__version__}, transformers "
        f"{transformers.__version__}: adapt them, or pin the older release in setup.cfg."
    )


def test_internals_of_the_libraries_are_as_expected(tmp_path: Path) -> None:
    problems = []
    for function, (names, why) in PARAMETERS.items():
        if names is not None and list(inspect.signature(function).parameters) != names:
            problems.append(moved(f"the signature of {function.__qualname__}", why))
    for function, piece, why in SOURCES:
        if piece not in inspect.getsource(function):
            problems.append(moved(f"{function.__qualname__}: `{piece}`", why))
    if list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:6] != [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
    ]:
        problems.append(
            moved("the signature of GRPOTrainer._get_per_token_logps_and_entropies", "PPO calls it by position")
        )

    sampler = RepeatSampler([1, 2], mini_repeat_count=1, seed=3)
    problems += [
        moved(f"RepeatSampler.{name}", "the order of an epoch is drawn from it")
        for name in ("shuffle", "generator", "seed")
        if not hasattr(sampler, name)
    ]
    trainer = PPOTrainer(
        toy.policy(),
        toy.share_of_red,
        toy.config(tmp_path, max_steps=1),
        toy.prompts(),
        processing_class=toy.tokenizer(),
    )
    problems += [moved(f"GRPOTrainer.{name}", why) for name, why in ATTRIBUTES.items() if not hasattr(trainer, name)]
    if "forward" not in trainer.model.__dict__:
        problems.append(moved("add_fused_lm_head", "it patches the forward of the instance, and a copy is undone"))
    trainer.train()
    if set(trainer._buffered_inputs[0]) != {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
        "returns",
        "old_values",
    }:
        problems.append(moved("the batch of _generate_and_score_completions", "PPO saves and trains on its tensors"))
    if not isinstance(trainer.value_model, nn.Module):
        problems.append(moved("accelerator.prepare_model", "PPO's critic is what it returns"))
    if problems:
        pytest.fail("\n".join(problems))
