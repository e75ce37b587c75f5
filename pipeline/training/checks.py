"""Checks of the training arguments before anything is trained; each function returns all problems that it finds."""

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
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.optimization import get_scheduler
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_liger_kernel_available
from trl import ModelConfig, RewardConfig, get_peft_config

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

UNSEEN = "training computes log-probabilities with temperature only, as if nothing else affected sampling"

NEUTRAL = ("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "low_memory")
"""Generation options that affect neither the distribution of tokens nor the end of completions."""


def check_lora(model_args: ModelConfig, model: PreTrainedModel) -> list[Problem]:
    """Check that LoRA's target modules exist, that its rank does not exceed theirs, and that PEFT accepts it.

    This adds adapters to the model, which cannot be used afterwards.
    """
    if not model_args.use_peft:
        return []
    # PEFT matches a list with the ends of names (["q_proj"]), and a string, a pattern, with whole ones (".*q_proj").
    modules = dict(model.named_modules())
    # Layers that PEFT can put a LoRA adapter on.
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
    layers = {name: module for name, module in modules.items() if isinstance(module, kinds)}
    projections = ", ".join(sorted({name.rpartition(".")[2] for name in modules if name.endswith("_proj")}))
    places = {
        "lora_target_modules": list(layers),
        "lora_modules_to_save": list(modules),
        "lora_target_parameters": [name for name, _ in model.named_parameters()],
    }
    problems = []
    for field, names in places.items():
        targets = getattr(model_args, field) or []
        if targets in ("all-linear", ["all-linear"]):
            if any(isinstance(module, Llama4TextExperts) for module in modules.values()):
                remedy = f"includes the routers, which LoRA cannot adapt; name projections: {projections}"
                problems.append(Problem(field, "all-linear", remedy))
        # PEFT checks a pattern, but for a list only that at least one name is found.
        elif not isinstance(targets, str):
            missing = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in names)]
            if missing:
                remedy = f"the model does not have such modules; choose from: {projections}, or all-linear"
                problems.append(Problem(field, ", ".join(missing), remedy))
    rank = max((min(layer.weight.shape[:2]) for layer in layers.values()), default=math.inf)
    if model_args.lora_r > rank:
        remedy = f"no matrix of the model has a rank above {rank}; lower it"
        problems.append(Problem("lora_r", model_args.lora_r, remedy))
    if problems:
        return problems

    config, field, remedy = get_peft_config(model_args), "lora_target_modules", ""
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
        options = [name for name in vars(model_args) if name.startswith(("lora_", "use_"))]
        named = (name for name in options if re.search(rf"\b(lora_)?{name.removeprefix('lora_')}\b", remedy))
        field = next(named, field)
    return [Problem(field, getattr(model_args, field), remedy)] if remedy else []


def check_generation_config(name: str, revision: str | None) -> list[Problem]:
    """Report options in a policy's generation_config.json that make sampling differ from what training assumes."""
    try:
        file = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:
        # The file is optional.
        return []
    # TRL sets these itself, so the file has no effect.
    sampling = ("temperature", "top_p", "top_k", "repetition_penalty", "do_sample", "max_new_tokens", "max_length")
    if others := unsupported_settings(file, (*NEUTRAL, *sampling, "bos_token_id", "eos_token_id", "pad_token_id")):
        remedy = f"its generation_config.json sets {others}, but {UNSEEN}; remove these from the file"
        return [Problem("model_name_or_path", name, remedy)]
    return []


def check_batches(rows: int, args: TrainingArguments) -> list[Problem]:
    """Check that a data set of `rows` rows fills at least one batch."""
    whole = args.per_device_train_batch_size * args.world_size
    field, needed = "per_device_train_batch_size", whole if args.dataloader_drop_last else 1
    if samples_completions(args) and args.generation_batch_size:
        # A generation batch contains each prompt `num_generations` times, and incomplete ones are dropped.
        field, needed = "generation_batch_size", max(1, args.generation_batch_size // (args.num_generations or 1))
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
    """Return the maximum number of checkpoints on the disk, and the bytes of these and of the model.

    Each of the `trained` weights takes 4 bytes, and the two numbers that the optimizer keeps for it take 8.
    """
    # Without a limit, all are kept; their number follows from the number of steps, if known.
    kept = math.ceil(args.max_steps / args.save_steps) if args.max_steps > 0 and args.save_steps >= 1 else 2
    if args.save_strategy == "no":
        kept = 0
    elif args.save_total_limit:
        # The next checkpoint is written before the oldest is deleted.
        kept = args.save_total_limit + 1
    return kept, kept * (4 if args.save_only_model else 12) * trained + 4 * trained


def check_disk(trained: int, args: TrainingArguments) -> list[Problem]:
    """Report a disk with less free space than the checkpoints and the model need."""
    kept, needed = disk_bytes(trained, args)
    free = shutil.disk_usage(nearest_existing(Path(args.output_dir))).free
    if needed <= free:
        return []
    sizes = f"take about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free"
    remedy = f"{kept} checkpoints and the model {sizes}; make room, lower save_total_limit or choose another disk"
    return [Problem("output_dir", args.output_dir, remedy)]


def preflight(args: TrainingArguments, early: bool = False) -> list[Problem]:
    """Try everything that the training arguments ask for: optimizer, schedule, packages, generation, the Hub.

    If it is `early`, before other steps run, a vLLM server does not have to exist yet.
    """
    problems = []
    # Build the schedule for an optimizer of one number, and read its learning rate at about fifty steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind, options, steps = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}, max(args.max_steps, 10)
    try:
        made = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options)
        shares = [share(step) for share in getattr(made, "lr_lambdas", []) for step in range(0, steps, 1 + steps // 50)]
        if options and shares and not (min(shares) >= 0 and max(shares) <= 1):
            remedy = f"scales the learning rate by {min(shares):g} to {max(shares):g}; correct it"
            problems.append(Problem("lr_scheduler_kwargs", options, remedy))
    except LIBRARY_ERRORS as error:
        missing = Problem("lr_scheduler_type", kind.value, f"needs lr_scheduler_kwargs ({error})")
        problems.append(Problem("lr_scheduler_kwargs", options, str(error)) if options else missing)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except LIBRARY_ERRORS as error:
        # Either a package is missing, or an option is wrong.
        field = "optim_args" if args.optim_args and not isinstance(error, ImportError) else "optim"
        value = getattr(args, field)
        problems.append(Problem(field, getattr(value, "value", value), str(error)))
    if args.use_liger_kernel and not is_liger_kernel_available():
        problems.append(Problem("use_liger_kernel", True, "liger-kernel is not installed; omit it"))
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            problems.append(Problem("report_to", name, f"no such tracker; choose from: none, {known}"))
        elif name not in get_available_reporting_integrations():
            problems.append(Problem("report_to", name, "is not installed; install it, or write `none`"))
    if samples_completions(args):
        problems += _check_rollouts(args, early)
    if isinstance(args, RewardConfig) and args.train_sampling_strategy == "group_by_length":
        problems.append(Problem("train_sampling_strategy", "group_by_length", "a pair has two lengths; omit it"))

    repo_id = args.hub_model_id or (Path(args.output_dir).absolute().name if args.push_to_hub else None)
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError as error:
        return [*problems, Problem("hub_model_id", repo_id, str(error))]
    # Only the first process asks whether the token may write there.
    if repo_id is not None and args.push_to_hub and os.environ.get("RANK", "0") == "0":
        skip_unreachable_hub()
        problems += check_access([repo_id], "push_to_hub", token=args.hub_token)
    return problems


def _check_rollouts(args: Any, early: bool) -> list[Problem]:
    """Check how GRPO, PPO or another trainer that samples does so.

    Unless it is `early`, wait for the vLLM server if one is used.
    """
    # RLOO has no such correction.
    corrects_loss = getattr(args, "vllm_importance_sampling_correction", False)
    problems = check_template_arguments(args.chat_template_kwargs)
    if args.remove_unused_columns:
        problems.append(Problem("remove_unused_columns", True, "would remove the columns that rewards read; omit it"))
    given = args.generation_kwargs or {}
    if args.use_vllm and (fault := validate_vllm()):
        problems.append(Problem("use_vllm", True, fault))
    elif args.use_vllm:
        if args.use_cpu:
            problems.append(Problem("use_cpu", True, "vLLM samples on the GPU that trains; omit one of the two"))
        # TRL needs its own values of these to use vLLM's output. With a seed, equal prompts would get equal answers.
        if taken := {"n", "seed", "logprobs", "prompt_logprobs", "max_tokens", "detokenize"}.intersection(given):
            remedy = f"{', '.join(sorted(taken))} cannot be given, because TRL depends on it; omit it"
            problems.append(Problem("generation_kwargs", given, remedy))
        if args.vllm_mode == "colocate":
            if args.world_size % args.vllm_tensor_parallel_size:
                remedy = f"must divide the number of processes, {args.world_size}"
                problems.append(Problem("vllm_tensor_parallel_size", args.vllm_tensor_parallel_size, remedy))
        elif not (args.use_cpu or taken or early) and os.environ.get("RANK", "0") == "0":
            # This imports parts of vLLM, which take seconds.
            from trl.generation.vllm_client import VLLMClient

            url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
            try:
                server = VLLMClient(url, connection_timeout=args.vllm_server_timeout).get_server_info()
                mode, fault = server["model_config"]["logprobs_mode"], ""
            except Exception as error:  # noqa: BLE001 - TRL raises bare exceptions for what a server answers
                fault = str(error)
            if not fault and corrects_loss and mode != "processed_logprobs":
                fault = f"its log-probabilities are {mode}, which cannot correct the loss"
            if fault:
                problems.append(Problem("vllm_mode", "server", f"{url}: {fault}; start it as {VLLM_SERVER}"))
    # vLLM's probabilities include all filters, and the loss is corrected by them.
    if args.use_vllm and corrects_loss:
        return problems
    # Fields that affect sampling, and the values with which they have no effect.
    unfiltered = {"top_p": (1.0,), "top_k": (0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    for name, neutral in unfiltered.items():
        if (value := getattr(args, name)) not in neutral:
            problems.append(Problem(name, value, f"{UNSEEN}; omit it"))
    cache = {"cache_implementation": args.cache_implementation}
    for field, options in {"generation_kwargs": given, "cache_implementation": cache}.items():
        if others := [name for name in options if name not in NEUTRAL]:
            remedy = f"{UNSEEN}; omit {', '.join(others)}, or set temperature and max_completion_length themselves"
            problems.append(Problem(field, options, remedy))
            continue
        try:
            GenerationConfig(**options).validate(strict=True)
        except (ValueError, TypeError, ImportError) as error:
            problems.append(Problem(field, getattr(args, field), str(error)))
    return problems
