"""What can be told to be wrong with a configuration before anything is trained; every function lists all it
finds."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import get_scheduler
from transformers.utils import is_liger_kernel_available

from pipeline.errors import Problem


def check_lora(
    model_args: Any, modules: Iterable[str], layers: Iterable[str], parameters: Iterable[str] = ()
) -> list[Problem]:
    """LoRA on modules that the model doesn't have, or that have no matrix.

    Args:
        model_args: `trl.ModelConfig`.
        modules: Names of all modules of the model.
        layers: Names of those that an adapter can be put on.
        parameters: Names of all its parameters.
    """
    if not getattr(model_args, "use_peft", False):
        return []
    modules, layers = list(modules), list(layers)
    linear = sorted({end for name in modules if (end := name.rpartition(".")[2]).endswith("_proj")})
    problems = []
    for field, names in (
        ("lora_target_modules", layers),
        ("lora_modules_to_save", modules),
        ("lora_target_parameters", list(parameters)),
    ):
        targets = getattr(model_args, field, None) or []
        if targets in ("all-linear", ["all-linear"]):
            continue
        if isinstance(targets, str):  # for PEFT a pattern of whole names
            try:
                missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
            except re.error as error:
                problems.append(Problem(field, targets, f"is not a regular expression ({error})"))
                continue
        else:
            missing = [
                target for target in targets if not any(name == target or name.endswith("." + target) for name in names)
            ]
        if missing:
            remedy = f"the model has no such modules; choose from: {', '.join(linear)}, or all-linear"
            problems.append(Problem(field, ", ".join(missing), remedy))
    return problems


def check_batches(rows: int | None, args: Any, what: str = "rows") -> list[Problem]:
    """Batches that leave nothing to train on.

    Args:
        rows: Rows of the training data; `None` if unknown (streamed).
        args: Training arguments.
        what: What the rows are called.
    """
    if rows is None:
        return []
    field, needed = "per_device_train_batch_size", 1
    if getattr(args, "dataloader_drop_last", False):
        needed = args.per_device_train_batch_size * args.world_size
    if hasattr(args, "num_generations") and getattr(args, "generation_batch_size", None):
        # A generation batch holds every prompt `num_generations` times, and an incomplete one is dropped.
        field, needed = (
            "generation_batch_size",
            max(1, args.generation_batch_size // (args.num_generations or 1)),
        )
    if rows >= needed:
        return []
    remedy = f"takes {needed} {what} and the data set has {rows}, so that nothing would be trained on; lower it"
    return [Problem(field, getattr(args, field), remedy)]


def check_disk(parameters: int, trainable: int, args: Any) -> list[Problem]:
    """Less room than the checkpoints and the model will take.

    Args:
        parameters: Weights that are saved with each checkpoint.
        trainable: Weights that the optimizer keeps two numbers for.
        args: Training arguments.
    """
    if str(args.save_strategy.value) == "no":
        kept = 0
    elif args.save_total_limit:
        kept = args.save_total_limit + 1  # the next one is written before the oldest is deleted
    else:
        # Without a limit all stay; how many that will be is known if the number of steps is.
        kept = math.ceil(args.max_steps / args.save_steps) if args.max_steps > 0 and args.save_steps >= 1 else 2
    optimizer = 0 if args.save_only_model else 8 * trainable
    needed = kept * (4 * parameters + optimizer) + 4 * parameters
    path = Path(args.output_dir)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    if needed <= free:
        return []
    remedy = (
        f"{kept} checkpoints and the model take about {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} "
        "MiB are free; "
        "make room, lower save_total_limit or choose another disk"
    )
    return [Problem("output_dir", args.output_dir, remedy)]


LIBRARY_ERRORS = (ValueError, TypeError, KeyError, ImportError, AttributeError, RuntimeError)


def rehearse(args: Any) -> list[Problem]:
    """Make what a run will need from its training arguments, and throw it away.

    Args:
        args: Any `TrainingArguments`.

    Returns:
        An optimizer, a schedule or a package that cannot be had, and a Hub id that is none.
    """
    return [*_try_optimizer(args), *_try_schedule(args), *_find_packages(args), *_check_hub_id(args)]


def _try_optimizer(args: Any) -> list[Problem]:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
    except LIBRARY_ERRORS as error:
        field = "optim_args" if args.optim_args and not isinstance(error, ImportError) else "optim"
        value = getattr(getattr(args, field), "value", getattr(args, field))
        return [Problem(field, value, str(error))]
    return []


def _try_schedule(args: Any) -> list[Problem]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
    steps = max(args.max_steps, 10)
    try:
        made = get_scheduler(
            kind, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=options or {}
        )
        shares = [share(step) for share in getattr(made, "lr_lambdas", []) for step in range(0, steps, 1 + steps // 50)]
    except LIBRARY_ERRORS as error:
        if options:
            return [Problem("lr_scheduler_kwargs", options, str(error))]
        return [Problem("lr_scheduler_type", getattr(kind, "value", kind), f"needs lr_scheduler_kwargs ({error})")]
    if options and shares and not (min(shares) >= 0 and max(shares) <= 1):
        remedy = f"takes the learning rate from {min(shares):g} to {max(shares):g} times its value; correct it"
        return [Problem("lr_scheduler_kwargs", options, remedy)]
    return []


def _find_packages(args: Any) -> list[Problem]:
    there = get_available_reporting_integrations()
    problems = []
    if args.use_liger_kernel and not is_liger_kernel_available():
        problems.append(Problem("use_liger_kernel", True, "liger-kernel is not installed; leave it out"))
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            problems.append(Problem("report_to", name, f"no such tracker; choose from: none, {known}"))
        elif name not in there and name != "flyte":  # of which transformers cannot tell
            problems.append(Problem("report_to", name, "is not installed; install it, or write `none`"))
    return problems


def _check_hub_id(args: Any) -> list[Problem]:
    if args.push_to_hub and args.hub_model_id is not None:
        try:
            validate_repo_id(args.hub_model_id)
        except HFValidationError as error:
            return [Problem("hub_model_id", args.hub_model_id, str(error))]
    return []
