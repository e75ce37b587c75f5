"""What the libraries find out when training begins, or after it, tried beforehand."""

from __future__ import annotations

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
