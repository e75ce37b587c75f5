"""Checks of the training arguments before anything is trained; each function returns all problems that it finds.

Checked is what would train something else, or fail late, or without saying why. What TRL and transformers reject in a
clear sentence is left to them: see `tests/training/test_left_to_the_libraries.py`.
"""

import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GenerationConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.optimization import get_scheduler
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from pipeline.config.fields import samples_completions
from pipeline.errors import LIBRARY_ERRORS, Problem
from pipeline.files import nearest_existing
from pipeline.hub.access import check_access
from pipeline.models.checks import check_template_arguments
from pipeline.models.kernels.sampler import unsupported_settings
from pipeline.models.loading import skip_unreachable_hub
from pipeline.models.vllm_sampler import validate_vllm

VLLM_SERVER = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)
"""Command that starts a server that accepts TRL's weights after each step."""

ADAPTED = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
"""Layers that PEFT can put a LoRA adapter on."""

UNSEEN = "training computes log-probabilities with temperature only, as if nothing else affected sampling"

NEUTRAL = ("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "low_memory")
"""Generation options that affect neither the distribution of tokens nor the end of completions."""


def check_lora(model_args: ModelConfig, model: PreTrainedModel) -> list[Problem]:
    """Check that LoRA's target modules exist, that its rank does not exceed theirs, and that PEFT accepts it.

    This adds adapters to the model, which cannot be used afterwards.
    """
    if not model_args.use_peft:
        return []
    problems = _check_targets(model_args, model)
    ranks = [min(layer.weight.shape[:2]) for layer in model.modules() if isinstance(layer, ADAPTED)]
    if ranks and model_args.lora_r > max(ranks):
        remedy = f"no matrix of the model has a rank above {max(ranks)}; lower it"
        problems.append(Problem("lora_r", model_args.lora_r, remedy))
    return problems or _try_lora(model_args, model)


def _check_targets(model_args: ModelConfig, model: PreTrainedModel) -> list[Problem]:
    """Check that the model has the modules and parameters that the fields of LoRA name.

    PEFT matches a list with the ends of names (["q_proj"]), and a string, a pattern, with whole ones (".*q_proj"). It
    checks a pattern, but of a list only that at least one name is there.
    """
    modules = dict(model.named_modules())
    names_by_field = {
        "lora_target_modules": [name for name, module in modules.items() if isinstance(module, ADAPTED)],
        "lora_modules_to_save": list(modules),
        "lora_target_parameters": [name for name, _ in model.named_parameters()],
    }
    projections = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name.endswith("_proj")}))
    problems = []
    for field, names in names_by_field.items():
        targets = getattr(model_args, field) or []
        if targets in ("all-linear", ["all-linear"]):
            if any(isinstance(module, Llama4TextExperts) for module in modules.values()):
                remedy = f"includes the routers, which LoRA cannot adapt; name projections: {projections}"
                problems.append(Problem(field, "all-linear", remedy))
        elif not isinstance(targets, str):
            missing = []
            for target in targets:
                if not any(f".{name}".endswith(f".{target}") for name in names):
                    missing.append(target)
            if missing:
                remedy = f"the model does not have such modules; choose from: {projections}, or all-linear"
                problems.append(Problem(field, ", ".join(missing), remedy))
    return problems


def _try_lora(model_args: ModelConfig, model: PreTrainedModel) -> list[Problem]:
    """Let PEFT add the adapter, without memory for it. Return what it rejects, under the field that it names."""
    config = get_peft_config(model_args)
    field = "lora_target_modules"
    remedy = ""
    if "SequenceClassification" in type(model).__name__:
        # PEFT saves the head of a reward model in full, as `recipes.reward` requests, so LoRA cannot adapt it.
        config.task_type = "SEQ_CLS"
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            get_peft_model(model, config)
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            remedy = "an adapter of the output layer would not be trained; name it in lora_modules_to_save instead"
    except re.error as error:
        remedy = f"is not a regular expression ({error})"
    except (ValueError, NotImplementedError, ImportError) as error:
        remedy = " ".join(str(error).split())
        for name in vars(model_args):
            is_option = name.startswith(("lora_", "use_"))
            # PEFT calls `lora_r` `r`.
            if is_option and re.search(rf"\b(lora_)?{name.removeprefix('lora_')}\b", remedy):
                field = name
                break
    if not remedy:
        return []
    return [Problem(field, getattr(model_args, field), remedy)]


def check_generation_config(name: str, revision: str | None) -> list[Problem]:
    """Report options in a policy's generation_config.json that make sampling differ from what training assumes."""
    try:
        file = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:
        # The file is optional.
        return []
    # TRL sets these itself, so the file has no effect.
    sampling = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample", "max_new_tokens", "max_length")
    settings = unsupported_settings(file, (*NEUTRAL, *sampling, "bos_token_id", "eos_token_id", "pad_token_id"))
    if not settings:
        return []
    remedy = f"its generation_config.json sets {settings}, but {UNSEEN}; remove these from the file"
    return [Problem("model_name_or_path", name, remedy)]


def check_batches(rows: int, args: TrainingArguments) -> list[Problem]:
    """Check that a data set of `rows` rows fills at least one batch."""
    field = "per_device_train_batch_size"
    needed = 1
    if args.dataloader_drop_last:
        needed = args.per_device_train_batch_size * args.world_size
    if samples_completions(args) and args.generation_batch_size:
        # A generation batch contains each prompt `num_generations` times, and incomplete ones are dropped.
        field = "generation_batch_size"
        needed = max(1, args.generation_batch_size // (args.num_generations or 1))
    if rows >= needed:
        return []
    remedy = f"takes {needed} rows and the data set has {rows}, so that nothing would be trained on; lower it"
    return [Problem(field, getattr(args, field), remedy)]


def total_steps(trainer: Trainer) -> int:
    """Return a trainer's total number of steps, which depends on the data unless it is set."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return int(steps)


def disk_bytes(trained: int, args: TrainingArguments) -> tuple[int, int]:
    """Return the maximum number of checkpoints on the disk, and the bytes of these checkpoints and of the final model.

    Args:
        trained: Number of trained weights. Each takes 4 bytes, and the two numbers that AdamW keeps for it take 8.
        args: The training arguments, which say how often checkpoints are saved, and how many stay.
    """
    if args.save_strategy == "no":
        checkpoints = 0
    elif args.save_total_limit:
        # One more, because the next checkpoint is written before the oldest is deleted.
        checkpoints = args.save_total_limit + 1
    elif args.max_steps > 0 and args.save_steps >= 1:
        # Without a limit, all stay.
        checkpoints = math.ceil(args.max_steps / args.save_steps)
    else:
        # Their number is not known yet.
        checkpoints = 2
    bytes_each = 4 if args.save_only_model else 12
    return checkpoints, checkpoints * bytes_each * trained + 4 * trained


def check_disk(trained: int, args: TrainingArguments) -> list[Problem]:
    """Report a disk with less free space than the checkpoints and the model need."""
    number, needed = disk_bytes(trained, args)
    free = shutil.disk_usage(nearest_existing(Path(args.output_dir))).free
    if needed <= free:
        return []
    sizes = f"take about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free"
    remedy = f"{number} checkpoints and the model {sizes}; make room, lower save_total_limit or choose another disk"
    return [Problem("output_dir", args.output_dir, remedy)]


def preflight(args: TrainingArguments, early: bool = False) -> list[Problem]:
    """Try what the training arguments ask for: schedule, optimizer, sampling, the Hub.

    `early` says that other steps run first, so that a vLLM server does not have to exist yet.
    """
    problems = _try_schedule(args) + _try_optimizer(args)
    if samples_completions(args):
        problems += _check_rollouts(args, early)
    return problems + _check_hub(args)


def _try_schedule(args: TrainingArguments) -> list[Problem]:
    """Build the schedule for an optimizer of one number, and read its learning rate at about fifty steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind = args.lr_scheduler_type
    options = args.lr_scheduler_kwargs or {}
    steps = max(args.max_steps, 10)
    try:
        schedule = get_scheduler(
            kind, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options
        )
        # The learning rate at some steps, as a share of the peak.
        shares = []
        for share_at in getattr(schedule, "lr_lambdas", []):
            shares += [share_at(step) for step in range(0, steps, 1 + steps // 50)]
    except LIBRARY_ERRORS as error:
        if options:
            return [Problem("lr_scheduler_kwargs", options, str(error))]
        return [Problem("lr_scheduler_type", kind.value, f"needs lr_scheduler_kwargs ({error})")]
    if options and shares and not (min(shares) >= 0 and max(shares) <= 1):
        remedy = f"scales the learning rate by {min(shares):g} to {max(shares):g}; correct it"
        return [Problem("lr_scheduler_kwargs", options, remedy)]
    return []


def _try_optimizer(args: TrainingArguments) -> list[Problem]:
    """Look up the optimizer with its options. Its package may be missing, or an option may be wrong."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except LIBRARY_ERRORS as error:
        field = "optim_args" if args.optim_args and not isinstance(error, ImportError) else "optim"
        value = getattr(args, field)
        return [Problem(field, getattr(value, "value", value), str(error))]
    return []


def _check_hub(args: TrainingArguments) -> list[Problem]:
    """Check the name of the model on the Hub and, on the first process, whether the token may write there."""
    repo_id = args.hub_model_id
    if repo_id is None and args.push_to_hub:
        repo_id = Path(args.output_dir).absolute().name
    if repo_id is None:
        return []
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return [Problem("hub_model_id", repo_id, str(error))]
    if not args.push_to_hub or os.environ.get("RANK", "0") != "0":
        return []
    skip_unreachable_hub()
    return check_access([repo_id], "push_to_hub", token=args.hub_token)


def _check_rollouts(args: Any, early: bool) -> list[Problem]:
    """Check how GRPO, PPO or another trainer that samples does so.

    Unless it is `early`, wait for the vLLM server if one is used.
    """
    # RLOO has no such correction.
    corrects_loss = getattr(args, "vllm_importance_sampling_correction", False)
    problems = check_template_arguments(args.chat_template_kwargs)
    if args.remove_unused_columns:
        problems.append(Problem("remove_unused_columns", True, "would remove the columns that rewards read; omit it"))
    if args.use_vllm:
        fault = validate_vllm()
        if fault:
            problems.append(Problem("use_vllm", True, fault))
        else:
            problems += _check_vllm(args, early, corrects_loss)
    # vLLM's probabilities include all filters, and the loss is corrected by them.
    if args.use_vllm and corrects_loss:
        return problems
    # Fields that affect sampling, and the values with which they have no effect.
    unfiltered = {"top_p": (1.0,), "top_k": (0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    for name, neutral in unfiltered.items():
        value = getattr(args, name)
        if value not in neutral:
            problems.append(Problem(name, value, f"{UNSEEN}; omit it"))
    problems += _check_generation("generation_kwargs", args.generation_kwargs, args.generation_kwargs or {})
    cache = args.cache_implementation
    return problems + _check_generation("cache_implementation", cache, {"cache_implementation": cache})


def _check_generation(field: str, value: Any, options: dict[str, Any]) -> list[Problem]:
    """Check that options of generation exist, and do not change what is sampled."""
    effective = [name for name in options if name not in NEUTRAL]
    if effective:
        remedy = f"{UNSEEN}; omit {', '.join(effective)}, or set temperature and max_completion_length themselves"
        return [Problem(field, options, remedy)]
    try:
        GenerationConfig(**options).validate(strict=True)
    except (ValueError, TypeError, ImportError) as error:
        return [Problem(field, value, str(error))]
    return []


def _check_vllm(args: Any, early: bool, corrects_loss: bool) -> list[Problem]:
    """Check the options of vLLM and, unless it is `early`, its server if it is one."""
    problems = []
    if args.use_cpu:
        problems.append(Problem("use_cpu", True, "vLLM samples on the GPU that trains; omit one of the two"))
    # TRL needs its own values of these to use vLLM's output. With a seed, equal prompts would get equal answers.
    reserved = {"n", "seed", "logprobs", "prompt_logprobs", "max_tokens", "detokenize"}
    options = args.generation_kwargs or {}
    conflicts = sorted(reserved.intersection(options))
    if conflicts:
        remedy = f"{', '.join(conflicts)} cannot be given, because TRL depends on it; omit it"
        problems.append(Problem("generation_kwargs", options, remedy))
    if args.vllm_mode == "colocate":
        if args.world_size % args.vllm_tensor_parallel_size:
            remedy = f"must divide the number of processes, {args.world_size}"
            problems.append(Problem("vllm_tensor_parallel_size", args.vllm_tensor_parallel_size, remedy))
    elif not (args.use_cpu or conflicts or early) and os.environ.get("RANK", "0") == "0":
        problems += _check_vllm_server(args, corrects_loss)
    return problems


def _check_vllm_server(args: Any, corrects_loss: bool) -> list[Problem]:
    """Wait for the server, and check that it returns the probabilities that completions were sampled with."""
    # This imports parts of vLLM, which take seconds.
    from trl.generation.vllm_client import VLLMClient

    url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
    fault = ""
    try:
        server = VLLMClient(url, connection_timeout=args.vllm_server_timeout).get_server_info()
        mode = server["model_config"]["logprobs_mode"]
        if corrects_loss and mode != "processed_logprobs":
            fault = f"its log-probabilities are {mode}, which cannot correct the loss"
    except Exception as error:  # noqa: BLE001 - TRL raises bare exceptions for what a server answers
        fault = str(error)
    if not fault:
        return []
    return [Problem("vllm_mode", "server", f"{url}: {fault}; start it as {VLLM_SERVER}")]
