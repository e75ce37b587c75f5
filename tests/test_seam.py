"""The seam to TRL, transformers, PEFT and accelerate: all that the project relies on beyond their documented API.

A failure names what moved, and what it is needed for; the tests of that part then show what broke. `.ci/newest` runs
this against the newest releases. Everything is looked up by name, so that one thing that moved hides no other.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

PIPELINE = Path(__file__).parents[1] / "pipeline"
LIBRARIES = ("trl", "transformers", "peft", "accelerate")
GRPO = "trl.trainer.grpo_trainer:GRPOTrainer"
TRAINER = "transformers.trainer:Trainer"

# Names that are imported from modules inside the libraries.
IMPORTS = {
    "accelerate.commands.config.config_args:load_config_from_file": "launch files are checked",
    "accelerate.commands.launch:_validate_launch_command": "a fork gets the environment that a launch would set",
    "accelerate.commands.launch:launch_command": "the runner launches with it",
    "accelerate.commands.launch:launch_command_parser": "the runner launches with it",
    "accelerate.logging:get_logger": "one process logs",
    "accelerate.utils:DynamoBackend": "the values of torch_compile_backend",
    "accelerate.utils:GradientAccumulationPlugin": "accelerator_config is tried before training",
    "accelerate.utils:broadcast_object_list": "the first process chooses the checkpoint",
    "accelerate.utils:extract_model_from_parallel": "a wrapped model's forward is inspected",
    "accelerate.utils:gather_object": "answers, and places in a stream, of all processes are collected",
    "accelerate.utils:is_peft_model": "PPO's reference of an adapter is the base model",
    "accelerate.utils:prepare_multi_gpu_env": "a fork gets the environment that a launch would set",
    "accelerate.utils:prepare_simple_launcher_cmd_env": "a fork gets the environment that a launch would set",
    "peft.tuners.tuners_utils:BaseTunerLayer": "adapters are merged into a critic",
    "peft.utils.other:AuxiliaryTrainingWrapper": "adapters are merged into a critic",
    "peft.utils.other:ModulesToSaveWrapper": "modules beside an adapter that would be multiplied with those in bf16",
    "transformers.cache_utils:DynamicLayer": "rollouts write into a cache that does not copy itself for each token",
    "transformers.hf_argparser:HfArg": "fields of argument dataclasses have a default and a help text",
    "transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK": "the values of report_to",
    "transformers.integrations.integration_utils:get_available_reporting_integrations": "the values of report_to",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward": "FlashAttention leaves padding to it",
    "transformers.masking_utils:sdpa_mask": "blockwise attention cuts the mask that it returns",
    "transformers.modeling_layers:GenericForSequenceClassification": "reward models of a Llama 4",
    "transformers.modeling_layers:GenericForTokenClassification": "critics of any architecture",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING": "classifiers are like language models",
    "transformers.models.auto.modeling_auto:MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING": "those that transformers has",
    "transformers.models.auto.modeling_auto:MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING": "critics that transformers has",
    "transformers.models.llama4.modeling_llama4:Llama4Router": "which experts take which tokens",
    "transformers.models.llama4.modeling_llama4:Llama4TextExperts": "Muon, and parameters that are active",
    "transformers.models.llama4.modeling_llama4:Llama4TextModel": "padding is not routed anywhere",
    "transformers.optimization:TYPE_TO_SCHEDULER_FUNCTION": "what a schedule needs is known before training",
    "transformers.optimization:get_scheduler": "schedules are tried before training",
    "transformers.pytorch_utils:Conv1D": "a layer that takes LoRA",
    "transformers.trainer_pt_utils:AcceleratorConfig": "accelerator_config is tried before training",
    "transformers.trainer_utils:EvalLoopOutput": "evaluations of GRPO and PPO return it",
    "transformers.trainer_utils:HubStrategy": "the critic is pushed as well",
    "transformers.trainer_utils:PREFIX_CHECKPOINT_DIR": "names of checkpoints",
    "transformers.trainer_utils:SaveStrategy": "checkpoints are written before evaluations",
    "transformers.trainer_utils:suppress_progress_bars": "checkpoints are pushed without bars",
    "transformers.utils.peft_utils:find_adapter_config_file": "adapters are told from models",
    "transformers.utils:cached_file": "a configuration of the Hub is checked before it is built",
    "transformers.utils:is_liger_kernel_available": "use_liger_kernel is checked",
    "transformers.utils:logging": "its bars are switched off",
    "trl.chat_template_utils:get_training_chat_template": "answers are found under templates that TRL knows",
    "trl.chat_template_utils:has_generation_markers": "answers are found under templates that mark them",
    "trl.extras.profiling:profiling_context": "sampling is timed as TRL times it",
    "trl.generation.vllm_generation:VLLMGeneration": "its merging of adapters rounds nothing",
    "trl.generation.vllm_client:VLLMClient": "a server is asked before anything is loaded",
    "trl.import_utils:is_vllm_available": "use_vllm is refused without it",
    "trl.trainer.utils:FusedCausalLMOutput": "SFTTrainer takes its log-probabilities and metrics from one",
    "trl.trainer.utils:add_fused_lm_head": "gives PPO's reference its head",
    "trl.trainer.utils:create_model_from_path": "the base model of an adapter is loaded as TRL loads models",
    "trl.trainer.utils:disable_dropout_in_model": "called on the critic",
    "trl.trainer.utils:get_callable_name": "rewards are logged under it",
    "trl.trainer.utils:is_async_callable": "rewards may be coroutines",
    "trl.trainer.utils:use_adapter": "turns a policy with an adapter into its reference",
}

# Functions that are called by position, wrapped or overridden: their parameters ("..." stands for any others).
PARAMETERS = {
    # The rollout
    f"{GRPO}.get_train_dataloader": ("self", "rows are left on their device; incomplete batches are dropped"),
    f"{GRPO}._get_train_sampler": ("self dataset", "the order of an epoch is that of its number"),
    f"{GRPO}._prepare_inputs": ("self generation_batch", "fills `_buffered_inputs`, which checkpoints contain"),
    f"{GRPO}._generate_single_turn": ("self prompt_ids ...", "rollouts are sampled by our sampler"),
    f"{GRPO}._generate_and_score_completions": ("self inputs", "PPO replaces the advantages it returns"),
    f"{GRPO}._calculate_rewards": (
        "self inputs prompts completions completion_ids_list",
        "PPO keeps the rewards it returns; completions that only functions without weight scored are left out",
    ),
    f"{GRPO}._get_per_token_logps_and_entropies": (
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy ...",
        "called by position; on CPUs, cheaper log-probabilities are returned",
    ),
    "trl.generation.vllm_generation:VLLMGeneration.sync_weights": ("self", "frozen weights are restored after it"),
    "trl.trainer.utils:add_fused_lm_head": (
        "model temperature cast_lm_head_to_fp32 outputs",
        "gives PPO's reference its head",
    ),
    "trl.trainer.utils:use_adapter": ("model adapter_name", "turns a policy with an adapter into its reference"),
    # The update
    f"{GRPO}._compute_loss": ("self model inputs", "PPO adds the value loss to what it returns"),
    f"{GRPO}.training_step": ("self model inputs num_items_in_batch", "the critic's gradients are zeroed there"),
    f"{TRAINER}.create_optimizer": ("self model", "the critic's parameters are added there"),
    f"{TRAINER}.get_decay_parameter_names": ("self model", "names the critic's parameters that weight decay is for"),
    f"{TRAINER}.get_optimizer_cls_and_kwargs": ("args model", "optimizers are tried before training"),
    f"{TRAINER}._clip_grad_norm": ("self model", "the critic is clipped there"),
    "trl.trainer.utils:disable_dropout_in_model": ("model", "called on the critic"),
    "peft.utils.other:AuxiliaryTrainingWrapper.unload_and_optionally_merge_module": (
        "self merge safe_merge adapter_names",
        "the critic is a copy with adapters merged",
    ),
    # Evaluation
    f"{TRAINER}.evaluation_loop": (
        "self dataloader ...",
        "runs under its own random state; metrics are added to its own",
    ),
    f"{TRAINER}._evaluate": ("self trial ...", "an evaluation that a kill prevented is run"),
    f"{TRAINER}._determine_best_metric": ("self metrics trial", "an evaluation that a kill prevented is run"),
    # Checkpoints
    f"{TRAINER}._maybe_log_save_evaluate": ("self tr_loss grad_norm ...", "checkpoints are written before evaluations"),
    f"{TRAINER}._save_checkpoint": ("self model trial", "checkpoints are written whole or not at all"),
    f"{TRAINER}._track_num_input_tokens": ("self inputs", "tokens are added up when they are logged or saved"),
    f"{TRAINER}._get_output_dir": ("self trial", "checkpoints are written elsewhere, and then moved"),
    f"{TRAINER}.save_model": ("self output_dir _internal_call", "the final model is written elsewhere, and then moved"),
    f"{TRAINER}._save": ("self output_dir state_dict", "the critic is saved there"),
    f"{TRAINER}._load_from_checkpoint": (
        "self resume_from_checkpoint model",
        "the critic, and weights under older names, are loaded there",
    ),
    f"{TRAINER}._load_best_model": ("self", "the critic, and weights under older names, are loaded there"),
    f"{TRAINER}._save_optimizer_and_scheduler": ("self output_dir", "the rollout is saved there"),
    f"{GRPO}._load_optimizer_and_scheduler": ("self checkpoint", "the rollout is loaded there"),
    f"{TRAINER}._load_rng_state": ("self checkpoint", "the place in a stream is loaded there, before it is read"),
    f"{TRAINER}._push_from_checkpoint": ("self checkpoint_folder", "the critic is pushed as well"),
}

# Pieces of source code: in which function or class, and what for.
SOURCES = [
    # The rollout
    (
        f"{GRPO}._prepare_inputs",
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "a restored rollout is trained on, not sampled again",
    ),
    (
        f"{GRPO}._prepare_inputs",
        "self._buffered_inputs[self._step % self.args.steps_per_generation]",
        "`_step` is restored as the place in the rollout",
    ),
    (f"{GRPO}._calculate_rewards", "rewards_per_func = gather(rewards_per_func)", "PPO slices them by process"),
    (
        f"{GRPO}._calculate_rewards",
        "apply_chat_template(x, reward_processing_class, **self.chat_template_kwargs)",
        "completions that were cut off, or that spell special tokens, are rendered as they stand",
    ),
    (f"{GRPO}._calculate_rewards", "text=texts, ", "what was rendered is what the reward model reads"),
    (
        f"{GRPO}._get_per_token_logps_and_entropies",
        "return logps, entropies, aux_loss",
        "PPO measures KL, ratio and entropy with them",
    ),
    (
        f"{GRPO}._get_per_token_logps_and_entropies",
        "model(**model_inputs, ",
        "positions are added to the arguments of the model",
    ),
    (
        f"{GRPO}._get_per_token_logps_and_entropies",
        '"attention_mask": attention_mask_batch',
        "positions are counted from it",
    ),
    (
        f"{GRPO}._generate_single_turn",
        "unwrapped_model.to(torch.bfloat16)",
        "continuous batching is refused because of it: where this is gone, it may be offered again",
    ),
    (
        f"{GRPO}.__init__",
        "lm_head.forward = cast_forward_to_fp32",
        "compute_in_float32 removes it from the head, because autocast undoes it",
    ),
    (
        f"{GRPO}.__init__",
        "generation_kwargs.update(args.generation_kwargs)",
        "`SET_BY_TRL` of training.checks lists the options above it",
    ),
    # The update
    (f"{GRPO}._compute_loss", "if advantages.dim() == 1:", "advantages may be (B, T)"),
    (f"{GRPO}._compute_loss", 'inputs.get("old_per_token_logps")', "the log-probabilities of the rollout are used"),
    (
        f"{GRPO}._compute_loss",
        'completion_mask if "tool_mask" not in inputs else completion_mask * inputs["tool_mask"]',
        "PPO masks completions without a score with it",
    ),
    (
        f"{GRPO}._compute_loss",
        'inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        "the value loss is normalised as the policy loss is",
    ),
    (
        f"{GRPO}._compute_loss",
        "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation",
        "the value loss is normalised as the policy loss is",
    ),
    (f"{TRAINER}._run_epoch", "model.zero_grad()", "only the policy is zeroed there, so PPO zeroes the critic"),
    (
        f"{TRAINER}._run_epoch",
        "self.accelerator.gradient_state._set_sync_gradients(do_sync_step)",
        "the critic's gradients are reduced when `sync_gradients` says so",
    ),
    (
        f"{TRAINER}.create_optimizer",
        "optimizer_cls()(opt_model, **optimizer_kwargs)",
        "our optimizers are made by a factory, which is given the model",
    ),
    (
        "transformers.trainer_optimizer:is_optimizer_factory",
        "isinstance(optimizer_cls_or_factory, type)",
        "a function without arguments is a factory",
    ),
    # The logs that the alarms and the report read
    (f"{GRPO}._generate_and_score_completions", '["frac_reward_zero_std"]', "an alarm reads it; PPO leaves it out"),
    (f"{GRPO}._generate_and_score_completions", '["reward_std"]', "an alarm reads it"),
    (f"{GRPO}._generate", '["completions/mean_length"]', "an alarm reads it"),
    (f"{GRPO}._generate", '["completions/clipped_ratio"]', "an alarm reads it"),
    (f"{GRPO}._compute_loss", '["entropy"]', "an alarm reads it"),
    (f"{GRPO}._compute_loss", '["kl"]', "an alarm reads it"),
    (f"{TRAINER}.log", "self.state.log_history.append(output)", "alarms are added after their entry"),
    (f"{GRPO}.log", "self._metrics[mode].items()", "means of an evaluation are taken out of them, weighted"),
    ("trl:SFTTrainer.compute_loss", "outputs = model(**inputs, fused_lm_head=True)", "our head is called by it"),
    # Packed conversations
    (
        "trl.trainer.sft_trainer:DataCollatorForLanguageModeling",
        'example["seq_lengths"]',
        "packed rows are divided into conversations by it",
    ),
    # Evaluation
    (f"{TRAINER}.evaluate", "metric_key_prefix=metric_key_prefix", "the prefix is taken from the keywords"),
    # Checkpoints
    (f"{TRAINER}.train", "_load_from_checkpoint(", "the critic is loaded when a run is resumed"),
    (f"{TRAINER}._prepare_for_training", "_load_optimizer_and_scheduler(", "so is the rollout"),
    (f"{TRAINER}._save_checkpoint", "_save_optimizer_and_scheduler(", "the rollout is part of a checkpoint"),
    (f"{TRAINER}._save_checkpoint", "self._get_output_dir(trial=trial)", "checkpoints are written elsewhere"),
    (
        f"{TRAINER}._load_from_checkpoint",
        "for subdir_name in adapter_subdirs",
        "takes a critic for the policy's adapter",
    ),
    (f"{TRAINER}._determine_best_metric", "metric_for_best_model", "the error for an unknown metric is read"),
    # Placement
    ("transformers.training_args:TrainingArguments", "return self._n_gpu", "a process trains on one GPU of several"),
    ("trl.trainer.utils:create_model_from_path", 'if "device_map" not in kwargs', "layers are not spread over GPUs"),
    # The configuration
    ("trl:GRPOConfig.__post_init__", "if self.num_generations < 2:", "PPOConfig avoids this check"),
    (
        "trl.trainer.base_config:_BaseConfig.__post_init__",
        "if self.bf16 is None",
        "PPOConfig knows by it that the user did not set bf16",
    ),
]

# Attributes of classes and of small objects.
ATTRIBUTES = {
    "transformers:GenerationConfig._get_default_generation_params": "options of a model's file without effect",
    "transformers:PreTrainedModel._from_config": "models are built without weights, to be checked",
    "transformers:PreTrainedModel._can_set_experts_implementation": "critics of experts are classes of ours",
    "transformers:PreTrainedModel._can_compile_fullgraph": "whether the cache may have room for more tokens",
    "transformers:PreTrainedModel._supports_flash_attn": "FlashAttention is chosen for models that can use it",
    "transformers:PreTrainedModel._tied_weights_keys": "weights that a file may lack",
    "transformers:AutoModelForCausalLM._model_mapping": "whether a model can be loaded as a language model",
    "transformers:PreTrainedConfig._attn_implementation": "packed rows are padded unless FlashAttention reads them",
    "transformers:PreTrainedTokenizerBase.added_tokens_decoder": "special tokens, which messages may not spell",
    "torch.distributed:distributed_c10d._get_default_store": "a process that stops leaves its exit code in it",
    f"{TRAINER}.end": "trackers and the process group end with it",
}

# Attributes of PPO's trainer, and what for.
TRAINER_ATTRIBUTES = {
    "_step": "the place in the rollout, saved and restored",
    "_buffered_inputs": "the rollout, saved and restored",
    "_metrics": "PPO's metrics are added to it",
    "_logs": "PPO's advantages are shown in it",
    "_tokenizer": "its vocabulary is compared with the reward models'",
    "_is_vlm": "PPO refuses multimodal models",
    "is_fsdp_enabled": "PPO refuses FSDP; TRL samples under it",
    "is_deepspeed_enabled": "PPO refuses DeepSpeed; TRL samples under it",
    "generation_config": "the settings of sampling",
    "use_vllm": "TRL samples then",
    "use_transformers_continuous_batching": "TRL samples then",
    "eos_token_ids": "PPO counts completions that ended",
    "reward_funcs": "the critic is made from the first model among them; those that fail are wrapped",
    "reward_func_names": "names in messages",
    "reward_processing_classes": "their vocabularies are compared with the policy's; wrapped while rewards are given",
    "reward_weights": "PPO's score is the weighted sum",
    "ref_model": "None as long as beta is 0; PPO puts its own there",
    "lr_scheduler": "PPO checks that a scheduler of the user's knows the critic",
    "temperature": "the logits of policy and reference are divided by it",
    "num_iterations": "PPO epochs",
    "_entropy_bonus_enabled": "entropies have gradients if it is set",
    "accelerator": "PPO reduces over processes with it",
    "control": "checkpoints are written before evaluations",
    "callback_handler": "progress bars are closed after an error",
}

# Tensors of a batch in `_buffered_inputs`, which are trained on and saved.
BATCH = {
    *("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"),
    *("advantages", "num_items_in_batch", "old_per_token_logps", "returns", "old_values"),
}

OURS = ("rewards/sandbox", "config/yaml_file.py")  # whose private attributes are their own


def moved(what: str, why: str) -> str:
    return f"{what} is not as expected: {why}"


def look_up(name: str) -> Any:
    """Return what a `module:name` names, None if it is not there."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def has_parameters(function: Any, expected: str) -> bool:
    names = list(inspect.signature(function).parameters)
    wanted = expected.removesuffix(" ...").split()
    return (names[: len(wanted)] if expected.endswith(" ...") else names) == wanted


def moved_names() -> Iterator[str]:
    for name, why in {**IMPORTS, **ATTRIBUTES}.items():
        if look_up(name) is None and name.rpartition(".")[2] != "_tied_weights_keys":  # None by default
            yield moved(name, why)
    for name, (parameters, why) in PARAMETERS.items():
        function = look_up(name)
        if function is None or not has_parameters(function, parameters):
            yield moved(f"the signature of {name}", why)
    for name, piece, why in SOURCES:
        found = look_up(name)
        if found is None or piece not in inspect.getsource(found):
            yield moved(f"{name}: `{piece}`", why)


def moved_in_a_run(folder: Path) -> Iterator[str]:
    from torch import nn
    from trl.trainer.utils import RepeatSampler

    from pipeline.rl.ppo import PPOTrainer
    from tests import ppo_toy as toy

    sampler = RepeatSampler([1, 2], mini_repeat_count=1, seed=3)
    for name in ("shuffle", "generator", "seed"):
        if not hasattr(sampler, name):
            yield moved(f"RepeatSampler.{name}", "the order of an epoch is drawn from it")

    trainer = PPOTrainer(
        toy.policy(),
        toy.share_of_red,
        toy.config(folder, max_steps=1),
        toy.prompts(),
        processing_class=toy.tokenizer(),
    )
    for name, why in TRAINER_ATTRIBUTES.items():
        if not hasattr(trainer, name):
            yield moved(f"GRPOTrainer.{name}", why)
    if not hasattr(trainer.model.config, "_name_or_path"):
        yield moved("PreTrainedConfig._name_or_path", "the default output_dir of PPO is named by it")
    if "forward" not in trainer.model.__dict__:
        yield moved("add_fused_lm_head", "it patches the forward of the instance, and the copy undoes that")
    if not isinstance(trainer.value_model, nn.Module):
        yield moved("accelerator.prepare_model", "the critic is what it returns")
    trainer.train()
    if set(trainer._buffered_inputs[0]) != BATCH:
        yield moved("the batch of _generate_and_score_completions", "PPO saves and trains on its tensors")


def test_the_libraries_are_as_expected(tmp_path: Path) -> None:
    problems = list(moved_names())
    try:
        problems += moved_in_a_run(tmp_path)
    except Exception as error:
        if not problems:
            raise
        problems.append(f"PPO does not run: {error!r}")  # because of them, perhaps
    if problems:
        releases = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        listed = "\n".join(problems)
        pytest.fail(f"Adapt pipeline/ to {releases}, or pin older releases in setup.cfg:\n{listed}", pytrace=False)


def private_names() -> Iterator[tuple[str, Path]]:
    """Yield what is imported from inside the libraries, and the private attributes that may be theirs."""
    trees = {path: ast.parse(path.read_text()) for path in PIPELINE.rglob("*.py")}
    nodes = [(node, path) for path, tree in trees.items() for node in ast.walk(tree)]
    defined = {node.name for node, _ in nodes if isinstance(node, ast.FunctionDef)}
    defined |= {node.attr for node, _ in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    theirs = "".join(inspect.getsource(pkgutil.resolve_name(name.split(":")[0])) for name in (GRPO, TRAINER))

    def may_be_theirs(attribute: str) -> bool:
        return attribute not in defined or f"self.{attribute}" in theirs

    for node, path in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            if "." in node.module:
                yield from ((f"{node.module}:{alias.name}", path) for alias in node.names)
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and may_be_theirs(node.attr):
            yield node.attr, path


def test_all_that_is_relied_on_is_listed() -> None:
    listed = {*IMPORTS, *TRAINER_ATTRIBUTES, "_name_or_path"}
    listed |= {name.rpartition(".")[2] for name in (*PARAMETERS, *ATTRIBUTES)}
    unlisted = {
        f"{name} ({path.relative_to(PIPELINE)})"
        for name, path in private_names()
        if name not in listed and not str(path.relative_to(PIPELINE)).startswith(OURS)
    }
    assert not unlisted, "not in the tables of this file"
    used = {name for name, _ in private_names()}
    assert {name for name in IMPORTS if name not in used} == set(), "no longer imported"
