"""The internals of TRL, transformers and PEFT that `pipeline.rl` relies on.

A failure here names the internals that moved, and what they are needed for. The other tests of PPO and GRPO then show
what broke.
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
from trl.trainer.base_config import _BaseConfig
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, disable_dropout_in_model, use_adapter

from pipeline.rl.ppo import PPOTrainer
from tests import ppo_toy as toy

# Functions that are called or overridden: their parameters ("..." stands for any others), and what for.
PARAMETERS: dict[Any, tuple[str, str]] = {
    # The rollout
    GRPOTrainer.get_train_dataloader: ("self", "rows are left on their device"),
    GRPOTrainer._get_train_sampler: ("self dataset", "the order of an epoch is that of its number"),
    GRPOTrainer._prepare_inputs: ("self generation_batch", "fills `_buffered_inputs`, which checkpoints contain"),
    GRPOTrainer._generate_and_score_completions: ("self inputs", "PPO replaces the advantages it returns"),
    GRPOTrainer._calculate_rewards: (
        "self inputs prompts completions completion_ids_list",
        "PPO keeps the rewards it returns; completions that only functions without weight scored are left out",
    ),
    GRPOTrainer._get_per_token_logps_and_entropies: (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy ...",
        "called by position; on CPUs, cheaper log-probabilities are returned",
    ),
    add_fused_lm_head: ("model temperature cast_lm_head_to_fp32 outputs", "gives the reference its head"),
    use_adapter: ("model adapter_name", "turns a policy with an adapter into its reference"),
    # The update
    GRPOTrainer._compute_loss: ("self model inputs", "PPO adds the value loss to what it returns"),
    GRPOTrainer.training_step: ("self model inputs num_items_in_batch", "the critic's gradients are zeroed there"),
    Trainer.create_optimizer: ("self model", "the critic's parameters are added there"),
    Trainer.get_decay_parameter_names: ("self model", "names the critic's parameters that weight decay applies to"),
    Trainer._clip_grad_norm: ("self model", "the critic is clipped there"),
    disable_dropout_in_model: ("model", "called on the critic"),
    AuxiliaryTrainingWrapper.unload_and_optionally_merge_module: (
        "self merge safe_merge adapter_names",
        "the critic is a copy with adapters merged",
    ),
    # Evaluation
    Trainer.evaluation_loop: ("self dataloader ...", "runs under its own random state; metrics are added to its own"),
    # Checkpoints
    Trainer._save: ("self output_dir state_dict", "the critic is saved there"),
    Trainer._load_from_checkpoint: ("self resume_from_checkpoint model", "the critic is loaded there"),
    Trainer._load_best_model: ("self", "the critic is loaded there"),
    Trainer._save_optimizer_and_scheduler: ("self output_dir", "the rollout is saved there"),
    GRPOTrainer._load_optimizer_and_scheduler: ("self checkpoint", "the rollout is loaded there"),
    Trainer._push_from_checkpoint: ("self checkpoint_folder", "the critic is added to what is pushed"),
}

# Pieces of source code: in which function, and what for.
SOURCES: list[tuple[Any, str, str]] = [
    # The rollout
    (
        GRPOTrainer._prepare_inputs,
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "a restored rollout is trained on, not sampled again",
    ),
    (
        GRPOTrainer._prepare_inputs,
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "`_step` is restored as the place in the rollout",
    ),
    (GRPOTrainer._calculate_rewards, "rewards_per_func = gather(rewards_per_func)", "PPO slices them by process"),
    (
        GRPOTrainer._calculate_rewards,
        "apply_chat_template(x, reward_processing_class, **self.chat_template_kwargs)",
        "conversations are rendered in order, those that were cut off without an end of turn",
    ),
    (
        GRPOTrainer._get_per_token_logps_and_entropies,
        "model(**model_inputs, labels=labels, fused_lm_head=True)",
        "the model is only called, so that positions can be added",
    ),
    (Trainer.log, "self.state.log_history.append(output)", "alarms are added after their entry"),
    (
        GRPOTrainer._get_per_token_logps_and_entropies,
        "return logps, entropies, aux_loss",
        "PPO measures KL, ratio and entropy with them",
    ),
    # The update
    (GRPOTrainer._compute_loss, "if advantages.dim() == 1:", "advantages may be (B, T)"),
    (GRPOTrainer._compute_loss, 'inputs.get("old_per_token_logps")', "the log-probabilities of the rollout are used"),
    (
        GRPOTrainer._compute_loss,
        'completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]',
        "PPO masks completions without a score with it",
    ),
    (
        GRPOTrainer._compute_loss,
        'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        "the value loss is normalised as the policy loss is",
    ),
    (
        GRPOTrainer._compute_loss,
        "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
        "the value loss is normalised as the policy loss is",
    ),
    (Trainer._run_epoch, "model.zero_grad()", "only the policy is zeroed there, so PPO zeroes the critic"),
    (
        Trainer._run_epoch,
        "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)",
        "the critic's gradients are reduced when `sync_gradients` says so",
    ),
    # Evaluation
    (Trainer.evaluate, "metric_key_prefix=metric_key_prefix", "the prefix is taken from the keywords"),
    (GRPOTrainer.log, "self._metrics[mode].items()", "means of an evaluation are taken out of them, weighted"),
    # Checkpoints
    (Trainer.train, "_load_from_checkpoint(", "the critic is loaded when a run is resumed"),
    (Trainer._prepare_for_training, "_load_optimizer_and_scheduler(", "the rollout is loaded when a run is resumed"),
    (Trainer._save_checkpoint, "_save_optimizer_and_scheduler(", "the rollout is part of a checkpoint"),
    # The configuration
    (GRPOConfig.__post_init__, "if self.num_generations < 2:", "PPOConfig avoids this check"),
    (_BaseConfig.__post_init__, "if self.bf16 is None", "PPOConfig knows by it that the user did not set bf16"),
]

# Attributes of a trainer, and what for.
ATTRIBUTES = {
    "_step": "the place in the rollout, saved and restored",
    "_buffered_inputs": "the rollout, saved and restored",
    "_metrics": "PPO's metrics are added to it",
    "_logs": "PPO's advantages are shown in it",
    "_tokenizer": "its vocabulary is compared with the reward models'",
    "_is_vlm": "PPO refuses multimodal models",
    "is_fsdp_enabled": "PPO refuses FSDP",
    "is_deepspeed_enabled": "PPO refuses DeepSpeed",
    "eos_token_ids": "PPO counts completions that ended",
    "reward_funcs": "the critic is made from the first model among them; those that fail are wrapped",
    "reward_func_names": "names in messages",
    "reward_processing_classes": "their vocabularies are compared with the policy's",
    "reward_weights": "PPO's score is the weighted sum",
    "ref_model": "None as long as beta is 0; PPO puts its own there",
    "lr_scheduler": "PPO checks that a scheduler of the user's knows the critic",
    "temperature": "the logits of policy and reference are divided by it",
    "num_iterations": "PPO epochs",
    "_entropy_bonus_enabled": "entropies have gradients if it is set",
    "accelerator": "PPO reduces over processes with it",
}

# Tensors of a batch in `_buffered_inputs`, which are trained on and saved.
BATCH = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    *("advantages", "num_items_in_batch", "old_per_token_logps", "returns", "old_values"),
}


def moved(what: str, why: str) -> str:
    return (
        f"{what} is not as pipeline.rl expects ({why}). TRL {trl.__version__}, transformers "
        f"{transformers.__version__}: adapt pipeline.rl, or pin the older release in setup.cfg."
    )


def has_parameters(function: Any, expected: str) -> bool:
    names = list(inspect.signature(function).parameters)
    wanted = expected.removesuffix(" ...").split()
    return (names[: len(wanted)] if expected.endswith(" ...") else names) == wanted


def test_internals_of_the_libraries_are_as_expected(tmp_path: Path) -> None:
    problems = []
    for function, (names, why) in PARAMETERS.items():
        if not has_parameters(function, names):
            problems.append(moved(f"the signature of {function.__qualname__}", why))
    for function, piece, why in SOURCES:
        if piece not in inspect.getsource(function):
            problems.append(moved(f"{function.__qualname__}: `{piece}`", why))
    sampler = RepeatSampler([1, 2], mini_repeat_count=1, seed=3)
    for name in ("shuffle", "generator", "seed"):
        if not hasattr(sampler, name):
            problems.append(moved(f"RepeatSampler.{name}", "the order of an epoch is drawn from it"))

    trainer = PPOTrainer(
        toy.policy(),
        toy.share_of_red,
        toy.config(tmp_path, max_steps=1),
        toy.prompts(),
        processing_class=toy.tokenizer(),
    )
    problems += [moved(f"GRPOTrainer.{name}", why) for name, why in ATTRIBUTES.items() if not hasattr(trainer, name)]
    if "forward" not in trainer.model.__dict__:
        problems.append(moved("add_fused_lm_head", "it patches the forward of the instance, and the copy undoes that"))
    if not isinstance(trainer.value_model, nn.Module):
        problems.append(moved("accelerator.prepare_model", "the critic is what it returns"))
    trainer.train()
    if set(trainer._buffered_inputs[0]) != BATCH:
        problems.append(moved("the batch of _generate_and_score_completions", "PPO saves and trains on its tensors"))
    if problems:
        pytest.fail("\n".join(problems))
