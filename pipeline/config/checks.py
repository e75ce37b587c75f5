"""Checks of field values: ranges, choices, and fields that contradict each other.

Each check returns problems, whose remedy continues the sentence "FIELD: VALUE: ...": "must be at least 1, or -1 for no
limit". `pipeline.config.parser` calls the first four before the argument dataclasses are built, with the fields that
the user has set, and `check_together` afterwards.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from torch.utils.checkpoint import checkpoint
from transformers.trainer_pt_utils import AcceleratorConfig

from pipeline import hardware, launch
from pipeline.errors import Problem, as_typed
from pipeline.files import STATE, as_list, is_missing_path, read_json, split_revision
from pipeline.files.bounded import MAX_LAYERS


class Range(NamedTuple):
    """The values that a numeric field may have.

    Attributes:
        contains: Whether a number is one of them.
        remedy: What a message about any other number says.
    """

    contains: Callable[[Any], bool]
    remedy: str


LARGEST = 2**53
"""Every number must be below this: floats represent every whole number up to it, but not all above it."""


def _at_least(low: float, end: float = LARGEST) -> Range:
    """Return the range that begins with `low` and ends before `end`."""
    bound = f"{end:g}" if end < LARGEST else "2^53"
    return Range(lambda value: low <= value < end, f"must be a number of at least {low:g}, below {bound}")


def _above(low: float, high: float | None = None) -> Range:
    """Return the range that begins after `low` and ends with `high`, or before `LARGEST` if `high` is None."""
    if high is None:
        return Range(lambda value: low < value < LARGEST, f"must be a number above {low:g}, below 2^53")
    return Range(lambda value: low < value <= high, f"must be a number above {low:g}, at most {high:,}")


def _between(low: float, high: float) -> Range:
    """Return the range that begins with `low` and ends with `high`."""
    return Range(lambda value: low <= value <= high, f"must be between {low:,} and {high:,}")


def for_each_name(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with an entry for each name, from a table whose keys are several names each.

    Example:
        {"bf16 fp16": True} -> {"bf16": True, "fp16": True}
    """
    return {name: value for names, value in table.items() for name in names.split()}


RANGES: dict[str, Range] = for_each_name(
    {
        "max_train_samples max_eval_samples max_prompts max_eval_prompts max_validation_prompts limit samples lora_r "
        "pairs_per_prompt save_total_limit eval_accumulation_steps ddp_bucket_cap_mb "
        "max_completion_length max_new_tokens ref_model_sync_steps vllm_tensor_parallel_size vllm_max_model_length "
        "intermediate_size_mlp interleave_moe_layer_step no_rope_layer_interval attention_chunk_size": _at_least(1),
        "block_size max_length samples_per_prompt": _at_least(2),
        "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout min_p": _at_least(0, 1),
        "local_rank": _at_least(-1),
        "max_steps": Range(lambda value: value == -1 or 1 <= value < LARGEST, "must be at least 1, or -1 for no limit"),
        "rope_theta initializer_range lora_alpha num_train_epochs eval_steps save_steps epsilon delta "
        "neftune_noise_alpha epsilon_high cliprange cliprange_value sapo_temperature_neg sapo_temperature_pos "
        "vllm_server_timeout": _above(0),
        "adam_epsilon top_p top_entropy_quantile vllm_gpu_memory_utilization": _above(0, 1),
        "learning_rate muon_learning_rate embedding_learning_rate temperature repetition_penalty": _above(0, 100),
        "value_learning_rate weight_decay": _between(0, 100),
        "validation_share": _between(0, 0.5),
        "warmup_ratio gamma lam value_lam ref_model_mixup_alpha": _between(0, 1),
        "seed data_seed": _between(0, 2**32 - 1),
        "size_mb": _between(0, 1e6),
        "dataset_num_proc": _between(1, 1024),
        "dataloader_num_workers": _between(0, 1024),
        "dataloader_prefetch_factor pad_to_multiple_of": _between(1, 1 << 16),
        "num_hidden_layers": _between(1, MAX_LAYERS),
        "num_attention_heads num_key_value_heads num_local_experts num_experts_per_tok": _between(1, 4096),
        # The tokenizer's trainer allocates the whole vocabulary at once.
        "vocab_size hidden_size intermediate_size max_position_embeddings model_max_length batch_size num_generations "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_generations_eval "
        "num_iterations steps_per_generation generation_batch_size": _between(1, 1 << 24),
        # More seconds overflow a timedelta.
        "ddp_timeout": _between(1, 10**9),
        "vllm_server_port vllm_group_port": _between(1, 65535),
        "reward_weights": Range(lambda value: -LARGEST < value < LARGEST, "must be numbers between -2^53 and 2^53"),
    }
)
"""The values that numeric fields, or the items of lists, may have, in any dataclass. Fields that are not in this table
must be at least 0."""

CHOICES: dict[str, tuple[str, ...]] = {
    "torch_compile_backend": tuple(backend.value.lower() for backend in DynamoBackend),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "lora_task_type": ("CAUSAL_LM", "SEQ_CLS"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8", "float16", "bfloat16", "float32"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    # A number is accepted as well.
    "pad_to_multiple_of": ("auto", "none"),
}
"""Fields that accept any text when they are parsed, but fail on most values once training has begun."""

ROLLOUT_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "luspo", "sapo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_mode": ("server", "colocate"),
    "vllm_model_impl": ("vllm", "transformers", "auto"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
"""Further choices of `GRPOConfig`. Fields of other dataclasses with these names have other values."""

UNSUPPORTED = for_each_name(
    {
        "trust_remote_code": "code from the Hub is never run here",
        "load_in_8bit": "is replaced by load_in_4bit",
        "model_init_kwargs": "is replaced by model_revision, attn_implementation and dtype",
        "dataset_text_field": "is replaced by messages_column",
        "completion_only_loss": "has no effect on conversations, use assistant_only_loss",
        "batch_eval_metrics": "metrics are computed once, over a whole evaluation",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps": "a resumed run would lose the updated reference",
        "do_train": "every recipe trains",
        "do_predict": f"is replaced by `{as_typed('evaluate')}`",
        "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config": (
            "TRL casts the trained weights themselves to bf16 for continuous batching, which loses small updates"
        ),
    }
)
"""Fields of the libraries' dataclasses that the recipes do not offer, and why."""

UNUSED_IN_ROLLOUTS: dict[str, str] = for_each_name(
    {
        "label_names label_smoothing_factor": "completions do not have labels",
        "prediction_loss_only include_for_metrics batch_eval_metrics": "an evaluation does not collect predictions",
        "data_seed train_sampling_strategy length_column_name": "only seed determines the order of the prompts",
        "average_tokens_across_devices": "loss_type says what the loss is divided by",
        "include_num_input_tokens_seen": "tokens are always counted",
        "log_multimodal": "the data are text",
        "local_rank": "the launcher numbers the processes",
    }
)
"""Fields of `TrainingArguments` and `GRPOConfig` that have no effect on GRPO and PPO, and why."""

SWITCHES: dict[str, tuple[str, Any]] = for_each_name(
    {
        "muon_learning_rate": ("use_muon", True),
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters": ("use_peft", True),
        "lora_modules_to_save use_rslora use_dora value_use_peft load_in_4bit": ("use_peft", True),
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage": ("load_in_4bit", True),
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target": ("use_adaptive_entropy", True),
        "num_completions_to_print log_unique_prompts": ("log_completions", True),
        "sapo_temperature_neg sapo_temperature_pos": ("loss_type", "sapo"),
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg": ("loss_type", "vespo"),
    }
)
"""Fields that only have an effect if another field, the switch, has a certain value: field -> (switch, value)."""


def check_ranges(values: Mapping[str, Any]) -> list[Problem]:
    """Return the numbers that are out of range; values of other types are left to the argument dataclass.

    `values` are the fields that the user has set, by name.
    """
    problems = []
    # The field's type allows null, but TRL fails with it.
    if "num_generations" in values and values["num_generations"] is None:
        problems.append(Problem("num_generations", "null", "must be set"))
    for name, value in values.items():
        numbers = [item for item in as_list(value) if isinstance(item, int | float) and not isinstance(item, bool)]
        allowed = RANGES.get(name, _at_least(0))
        if not all(allowed.contains(number) for number in numbers):
            problems.append(Problem(name, value, allowed.remedy))
    return problems


def check_text(values: Mapping[str, Any], hints: Mapping[str, Any], samples: bool) -> list[Problem]:
    """Return strings that are empty, not among the choices, or no mapping where one is needed.

    Args:
        values: Values of fields.
        hints: Types of these fields.
        samples: Whether the fields are those of a trainer that samples, whose choices differ.
    """
    problems = []
    choices = CHOICES | ROLLOUT_CHOICES if samples else CHOICES
    for name, value in values.items():
        texts = [item for item in as_list(value) if isinstance(item, str)]
        if any("\0" in text for text in texts):
            problems.append(Problem(name, repr(value), "contains a NUL character; remove it"))
        elif "" in texts and name not in ("debug", "system_prompt"):
            problems.append(Problem(name, repr(value), "is empty; give a value, or null for none"))
        elif samples and name == "loss_type" and "gspo" in texts:
            remedy = "is no loss of its own: set importance_sampling_level: sequence, with loss_type: grpo"
            problems.append(Problem(name, value, remedy))
        elif name in choices and any(text not in choices[name] for text in texts):
            problems.append(Problem(name, value, f"must be one of {', '.join(choices[name])}"))
        # A mapping that is written as text is JSON. For some mappings, the libraries also accept the path of a JSON
        # file, but not for keyword arguments.
        elif texts and "dict" in str(hints[name]) and (name.endswith("_kwargs") or value.startswith("{")):
            try:
                if not isinstance(json.loads(value), dict):
                    raise ValueError("it is something else")
            except (ValueError, RecursionError) as error:
                problems.append(Problem(name, value, f"write a mapping as JSON, such as '{{\"name\": 1}}' ({error})"))
    return problems


def check_supported(values: Mapping[str, Any]) -> list[Problem]:
    """Return the fields, of those that the user has set, that this machine, the recipes or a library do not support."""
    problems = _check_precision(values)
    for name, setting in (("use_cpu", False), ("activation_offloading", True)):
        if values.get(name) is setting and hardware.accelerator() is None:
            problems.append(Problem(name, setting, "needs an accelerator, and this machine has only a CPU; omit it"))
    for name, reason in UNSUPPORTED.items():
        if values.get(name):
            problems.append(Problem(name, values[name], f"{reason}; omit it"))
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    backends = CHOICES["torch_compile_backend"]
    if backend.lower() not in backends:
        problems.append(Problem("ACCELERATE_DYNAMO_BACKEND", backend, f"must be one of {', '.join(backends)}"))

    return problems + _try_options(values)


def _try_options(values: Mapping[str, Any]) -> list[Problem]:
    """Return the mappings of options that a library rejects.

    They are tried here, because the library itself would not name the field, or would only reject them in training.
    """
    problems = []
    for name in ("accelerator_config", "gradient_checkpointing_kwargs"):
        value = values.get(name)
        try:
            options = value
            if isinstance(value, str) and value.startswith("{"):
                options = json.loads(value)
            # Any other text is the path of a file, which transformers reads, and whose mistakes it reports.
            if isinstance(options, dict) and name == "accelerator_config":
                GradientAccumulationPlugin(**(AcceleratorConfig(**options).gradient_accumulation_kwargs or {}))
            elif isinstance(options, dict):
                checkpoint(torch.nn.Identity(), torch.zeros(1), **{"use_reentrant": False, **options})
        except (TypeError, ValueError) as error:
            problems.append(Problem(name, value, f"{error}; correct it, or omit it"))
    return problems


def _check_precision(values: Mapping[str, Any]) -> list[Problem]:
    """Return the fields that ask for half precision that this machine does not have, or for two kinds of it."""
    problems = []
    best = hardware.precision()
    for name in ("bf16", "bf16_full_eval", "fp16", "fp16_full_eval", "dtype", "frozen_dtype"):
        value = values.get(name)
        precision = None
        if name.endswith("dtype"):
            precision = {"bfloat16": "bf16", "float16": "fp16"}.get(str(value))
        elif value:
            # "bf16_full_eval" asks for bf16.
            precision = name[:4]
        # Training in fp16 converts frozen weights of any dtype to fp16 before it multiplies with them, so they need
        # not be supported.
        is_converted = name == "frozen_dtype" and values.get("fp16", best.value == "fp16")
        if precision is not None and not is_converted and not hardware.supports(precision):
            remedy = f"not supported on this machine; omit it to use {best.value} ({best.reason})"
            problems.append(Problem(name, value, remedy))
    if values.get("bf16") and values.get("fp16"):
        problems.append(Problem("bf16", True, "excludes fp16; choose one"))
    return problems


def check_unused(values: Mapping[str, Any], kind: type, unused: Mapping[str, str]) -> list[Problem]:
    """Return the fields without an effect that have another value than their default.

    Args:
        values: Values of fields, by name; the others have their defaults.
        kind: The dataclass.
        unused: Fields of this dataclass that have no effect, and why.
    """
    problems = []
    for item in dataclasses.fields(kind):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if item.name in unused and values.get(item.name, default) != default:
            problems.append(Problem(item.name, values[item.name], f"has no effect: {unused[item.name]}; omit it"))
    return problems


def check_together(
    arguments: Iterable[Any], rejected: Collection[str], on_command_line: Collection[str]
) -> list[Problem]:
    """Return fields that contradict each other or the files that they name.

    Args:
        arguments: The argument dataclasses of a recipe. Their defaults pass these checks.
        rejected: Fields that were omitted as invalid, and are not reported again.
        on_command_line: Fields that the user gave on the command line. A file's fields are not reported only because
            the command line turns off what they belong to.
    """
    fields = _Fields(list(arguments), rejected, on_command_line)
    _check_steps(fields)
    _check_switches(fields)
    _check_quantization(fields)
    _check_optimizer(fields)
    _check_evaluation(fields)
    _check_rows(fields)
    _check_checkpoint(fields)
    return fields.problems


class _Fields:
    """All fields of a recipe's argument dataclasses, and what is wrong with them together."""

    def __init__(self, arguments: list[Any], rejected: Collection[str], on_command_line: Collection[str]) -> None:
        self.values = {name: getattr(item, name) for item in arguments for name in vars(item)}
        self.defaults = {name: getattr(type(item), name, None) for item in arguments for name in vars(item)}
        self.rejected = rejected
        self.on_command_line = on_command_line
        self.problems: list[Problem] = []

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a field, or the default if the recipe does not have the field."""
        return self.values.get(name, default)

    def reject(self, name: str, remedy: str) -> None:
        """Add a problem with a field to `problems`, unless the field was rejected by an earlier check."""
        if name not in self.rejected:
            value = self.get(name)
            # Members of an enumeration are shown as users write them.
            self.problems.append(Problem(name, getattr(value, "value", value), remedy))


def _check_steps(fields: _Fields) -> None:
    """Report a stream without a number of steps, and warm-ups that are longer than training."""
    steps = fields.get("max_steps", 0)
    if fields.get("dataset_streaming") and fields.get("max_steps", 1) <= 0:
        fields.reject("max_steps", "must be given: a stream has no length")
    results = {
        "warmup_steps": "the learning rate would never be reached",
        "value_warmup_steps": "the policy would never be trained",
    }
    for name, result in results.items():
        # For a trial run with `--max_steps 2`, the file's warm-up need not be lowered as well.
        is_trial = "max_steps" in fields.on_command_line and name not in fields.on_command_line
        if fields.get(name, 0) > steps > 0 and not is_trial:
            fields.reject(name, f"is more than max_steps ({steps}), and {result}; lower it")


def _check_switches(fields: _Fields) -> None:
    """Report fields that have no effect because their switch (`SWITCHES`) is off."""
    for name, (switch, on) in SWITCHES.items():
        is_set = fields.get(name) != fields.defaults.get(name)
        # With `--use_peft false` on the command line, the file's LoRA options need not be removed as well.
        is_excused = switch in fields.on_command_line and name not in fields.on_command_line
        if is_set and fields.get(switch) != on and not is_excused and switch not in fields.rejected:
            fields.reject(name, f"has no effect unless {switch} is {str(on).lower()}; set that, or omit it")


def _check_quantization(fields: _Fields) -> None:
    """Report what `load_in_4bit` cannot be combined with, and a missing bitsandbytes."""
    if not fields.get("load_in_4bit"):
        return
    if fields.get("fsdp") or fields.get("deepspeed") or any(map(launch.is_sharded_by, launch.SHARDING)):
        fields.reject("load_in_4bit", "layers with 4 bits cannot be split over processes; use ddp.yaml, or omit it")
    if fields.get("use_vllm"):
        fields.reject("use_vllm", "vLLM would sample from the base model in 16 bits; omit it, or load_in_4bit")
    if fields.get("value_use_peft") is False:
        fields.reject("value_use_peft", "a critic with 4 bits is only trained as an adapter; omit it, or load_in_4bit")
    # Whoever corrects another fault by omitting load_in_4bit does not need the package.
    if not fields.problems and importlib.util.find_spec("bitsandbytes") is None:
        fields.reject("load_in_4bit", 'needs bitsandbytes; install it with pip install -e ".[qlora]"')


def _check_optimizer(fields: _Fields) -> None:
    """Report what does not fit Muon, which updates the matrices inside the blocks, and AdamW for everything else."""
    options = [name for name in ("use_muon", "embedding_learning_rate") if fields.get(name)]
    if options:
        for name in ("optim", "optim_args", "optim_target_modules"):
            if fields.get(name) and fields.get(name) not in ("adamw_torch", "adamw_torch_fused"):
                remedy = f"has no effect with {' and '.join(options)}, which come with AdamW; omit one of them"
                fields.reject(name, remedy)
    if fields.get("use_muon") and (fields.get("deepspeed") or launch.is_sharded_by("DeepSpeed")):
        fields.reject(
            "use_muon", "needs matrices, and DeepSpeed's optimizers get flat tensors; omit it, or use fsdp2.yaml"
        )
    layers = f"{fields.get('lora_target_modules')} {fields.get('lora_modules_to_save')}"
    if fields.get("use_peft") and "embed" not in layers and "lm_head" not in layers:
        for name in options:
            unset = "false" if fields.get(name) is True else "null"
            fields.reject(name, f"LoRA does not train embeddings; omit it, or set it to {unset}")


def _check_evaluation(fields: _Fields) -> None:
    """Report options of evaluations and of the choice of a checkpoint that would never be used."""
    if fields.get("label_names") not in (None, ["labels"]):
        fields.reject("label_names", "rows have their labels in `labels`; omit it")
    for name in ("eval_on_start", "do_eval"):
        if fields.get(name) and fields.get("eval_strategy") == "no":
            fields.reject(name, "needs an eval_strategy other than no; omit it")
    if fields.get("save_strategy") == "best" and not fields.get("metric_for_best_model"):
        fields.reject(
            "save_strategy", "needs metric_for_best_model to compare checkpoints; set that, or choose another one"
        )


def _check_rows(fields: _Fields) -> None:
    """Report options of the rows, their batches and their loss that contradict each other."""
    if fields.get("packing") and fields.get("max_length", 0) is None:
        fields.reject("max_length", "must be given with packing, whose rows are of that length")
    if fields.get("padding_free") and not fields.get("packing") and fields.get("max_length") is not None:
        fields.reject("padding_free", "does not cut rows at max_length; set packing to true, or max_length to null")
    # Some losses ignore the trainer's smoothing: all of reward models and preferences, and some of TRL's SFT.
    ignores_smoothing = "center_rewards_coefficient" in fields.values or fields.get("loss_type", "nll") != "nll"
    if fields.get("label_smoothing_factor") and ignores_smoothing:
        fields.reject("label_smoothing_factor", "has no effect on this loss (DPO has label_smoothing); omit it")
    if fields.get("dataloader_persistent_workers") and not fields.get("dataloader_num_workers"):
        fields.reject("dataloader_persistent_workers", "needs dataloader_num_workers; omit it")


def _check_checkpoint(fields: _Fields) -> None:
    """Report a checkpoint to resume from that is missing or damaged; one on the Hub is left to the trainer."""
    name = str(fields.get("resume_from_checkpoint") or "")
    if not name:
        return
    path = Path(name)
    is_on_hub = "/" in name and not path.exists() and not is_missing_path(split_revision(name)[0])
    if is_on_hub or "global_step" in read_json(path / STATE):
        return
    if (path / STATE).is_file():
        fault = "is damaged"
    elif path.is_dir():
        fault = "is not a checkpoint"
    else:
        fault = "is not a directory"
    remedy = f"{fault}; omit it to resume from the latest complete checkpoint"
    fields.reject("resume_from_checkpoint", remedy)
