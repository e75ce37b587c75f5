"""Every field of `GRPOConfig` and `PPOConfig` is used, refused or for vLLM: none is accepted and ignored.

A new field of TRL or transformers belongs in one of the lists: find out what reads it. One that nothing reads belongs
in `UNUSED_IN_ROLLOUTS` of `pipeline.config.checks`, or `UNUSED` of `pipeline.rl.ppo_config`, which refuse it.
"""

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import trainer_callback, trainer_optimizer
from transformers.integrations import integration_utils
from trl import GRPOConfig
from trl.trainer import callbacks, grpo_trainer

from pipeline.config.checks import ROLLOUT_CHOICES, UNSUPPORTED, UNUSED_IN_ROLLOUTS
from pipeline.config.parser import parse
from pipeline.errors import UserError
from pipeline.rl import critic, value_model
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import UNUSED, PPOConfig
from pipeline.training import frozen_weights
from pipeline.training.checks import preflight

USED = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
    metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
    full_determinism seed use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers
    dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics do_eval resume_from_checkpoint

    router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 num_generations num_generations_eval
    max_completion_length max_tool_calling_iterations
    ds3_gather_for_generation shuffle_dataset pad_to_multiple_of generation_batch_size
    steps_per_generation temperature top_p top_k min_p generation_kwargs chat_template_kwargs repetition_penalty
    cache_implementation beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos
    vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights
    multi_objective_aggregation scale_rewards loss_type mask_truncated_completions
    top_entropy_quantile entropy_coef use_adaptive_entropy
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold
    use_bias_correction_kl log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo
"""
OF_PPO = """
    kl_coef frozen_dtype gamma lam value_lam cliprange cliprange_value vf_coef value_learning_rate
    value_warmup_steps whiten_advantages reward_normalization missing_eos_penalty
"""
FOR_VLLM = """
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url
    vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_max_model_length vllm_tensor_parallel_size vllm_importance_sampling_correction
    vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    vllm_importance_sampling_cap
"""
# TRL refuses the first; rewards read the columns that the second would remove.
OTHERWISE_REFUSED = {"auto_find_batch_size", "remove_unused_columns"}
# Values other than the default, for fields that do not accept any number or text.
OTHER = {
    "accelerator_config": "{}",
    "deepspeed": '{"a": 1}',
    "fsdp_config": '{"a": 1}',
    "include_for_metrics": "loss",
    "include_num_input_tokens_seen": "true",
    "importance_sampling_level": "sequence",
    "label_smoothing_factor": "0.5",
    "loss_type": "grpo",
    "model_init_kwargs": '{"a": 1}',
    "multi_objective_aggregation": "normalize_then_sum",
    "ref_model_mixup_alpha": "0.5",
    "scale_rewards": "batch",
    "train_sampling_strategy": "group_by_length",
    "transformers_continuous_batching_config": '{"a": 1}',
}
TRAINERS = {GRPOConfig: GRPOTrainer, PPOConfig: PPOTrainer}
CONFIGS = pytest.mark.parametrize("kind", TRAINERS)


def names(kind: type) -> set[str]:
    return {item.name for item in dataclasses.fields(kind)}


def rejected_fields(kind: type) -> set[str]:
    own = set(UNUSED) if kind is PPOConfig else set(UNUSED_IN_ROLLOUTS)
    return own | OTHERWISE_REFUSED | (set(UNSUPPORTED) & names(kind))


def used(kind: type) -> set[str]:
    return {*USED.split(), *OF_PPO.split()} - rejected_fields(kind) if kind is PPOConfig else set(USED.split())


def method_sources(kind: type) -> str:
    """Return the source of the methods that run: inherited ones only if no override replaces them."""
    sources = []
    for name in dir(kind):
        for cls in kind.__mro__:
            found = vars(cls).get(name)
            found = getattr(found, "fget", getattr(found, "func", getattr(found, "__func__", found)))
            found = inspect.unwrap(found) if callable(found) else found
            if not inspect.isfunction(found) or found.__code__.co_filename.startswith("<"):
                continue
            # It is not a method, or `dataclass` made it.
            sources.append(inspect.getsource(found))
            if "super()" not in sources[-1]:
                break
    return "\n".join(sources)


@functools.cache
def sources(kind: type) -> str:
    modules = (trainer_optimizer, trainer_callback, integration_utils, callbacks, critic, frozen_weights, value_model)
    texts = [inspect.getsource(module) for module in modules]
    return "\n".join([method_sources(TRAINERS[kind]), method_sources(kind), *texts])


@CONFIGS
def test_each_field_is_in_one_list(kind: type) -> None:
    lists = [used(kind), rejected_fields(kind), set(FOR_VLLM.split())]
    unknown = names(kind) - set.union(*lists)
    assert not unknown, f"new fields, which nothing may read: {sorted(unknown)}"
    gone = set.union(*lists) - names(kind)
    assert not gone, f"fields that are gone: {sorted(gone)}"
    assert sum(map(len, lists)) == len(names(kind)), "some fields are in two lists"


@CONFIGS
def test_what_is_used_is_read(kind: type) -> None:
    read = sources(kind)
    unread = [name for name in used(kind) if not re.search(rf'\b(args|self)(\.{name}\b|, "{name}")', read)]
    assert not unread, "fields that no method of the trainer or of its configuration reads"


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(k, n, id=f"{k.__name__}.{n}") for k in TRAINERS for n in sorted(rejected_fields(k))]
)
def test_what_is_refused_is_refused(kind: Any, name: str, tmp_path: Path) -> None:
    default = next(item.default for item in dataclasses.fields(kind) if item.name == name)
    value = str(not default) if isinstance(default, bool) else OTHER.get(name, "7")
    argv = ["--output_dir", str(tmp_path / "run"), f"--{name}", value, "--report_to", "none"]
    argv += ["--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "8"]
    try:
        problems = preflight(*parse(kind, argv=argv))
    except UserError as error:
        problems = list(error.problems)
    assert [problem.field for problem in problems] == [name]
    assert {**UNUSED, **UNSUPPORTED}.get(name, "") in problems[0].remedy


@pytest.mark.parametrize("name", [name for name in ROLLOUT_CHOICES if not name.startswith("vllm_mod")])
def test_the_choices_of_a_field_are_the_words_with_which_trl_compares_it(name: str) -> None:
    """TRL rejects other words only after the first rollout, without naming the field."""
    words = set()
    for node in ast.walk(ast.parse(inspect.getsource(grpo_trainer))):
        if isinstance(node, ast.Compare) and getattr(node.left, "attr", "") == name:
            words |= {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
    assert words == set(ROLLOUT_CHOICES[name])
