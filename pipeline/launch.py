"""What is really active in a run, whatever the launch file asked for."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import torch

from pipeline import hardware
from pipeline.errors import Problem
from pipeline.hardware import keep_freed_memory

if TYPE_CHECKING:  # their import takes seconds, which `--help` has not
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)


def prepare_process() -> None:
    """Do what must be done before a process builds its training arguments.

    Telemetry is switched off (unless `HF_HUB_DISABLE_TELEMETRY=0` asks for it), a CPU is made ready,
    log lines go to stderr from the first process only, and the process ends with its launcher.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    # The Hub client reads the variable when it is imported, which may have been before.
    constants.HF_HUB_DISABLE_TELEMETRY = os.environ["HF_HUB_DISABLE_TELEMETRY"].upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    )
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    for package in ("pipeline", "recipes"):
        logging.getLogger(package).setLevel(level)
    if hardware.accelerator() is None:
        prepare_cpu()
    die_with_launcher()
    leave_group_of_one()


def prepare_cpu() -> None:
    """Let a process compute on all cores that are its share, and keep the memory that it frees."""
    torch.set_num_threads(hardware.threads().value)
    keep_freed_memory()


def die_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies, which may not be able to pass its own death on.

    Otherwise a worker whose launcher was killed goes on training, and writes where the next run writes too.
    Linux only; elsewhere the lock on the output directory keeps the next run waiting.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGTERM), 0, 0, 0)


def leave_group_of_one() -> None:
    """Forget a launcher's group of one process: it would cost a gradient exchange with nobody, and
    compilation.

    The launch file starts any number of processes by one means, so that one process also finds itself in a
    group.
    """
    if os.environ.get("WORLD_SIZE") == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def check_launch(args: TrainingArguments) -> list[Problem]:
    """Compare what the launch file asked for with what is active.

    Args:
        args: Training arguments; they hold the state of the process group.

    Returns:
        What was asked for and isn't there.
    """
    problems = []
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != args.world_size:
        remedy = f"only {args.world_size} would train together; on CPUs leave use_cpu and ddp_backend to the recipe"
        problems.append(Problem("num_processes", asked, remedy))
    on_cpu = args.device.type == "cpu"
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true" and on_cpu:
            remedy = "is never active on CPUs, which would train unsharded; use accelerate_config.yaml"
            problems.append(Problem("distributed_type", name, remedy))
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None) and on_cpu:
            problems.append(Problem(name, getattr(args, name), "is never active on CPUs; leave it out"))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16") and not hardware.supports(precision):
        best = hardware.precision()
        remedy = f"this machine lacks it; write `no` to use {best.value} ({best.reason})"
        problems.append(Problem("mixed_precision", precision, remedy))
    if precision == "fp8":
        problems.append(Problem("mixed_precision", precision, "is not supported by the recipes; write `no`"))
    return problems


def log_active(trainer: Trainer) -> None:
    """Log once what a trainer really runs on: processes, sharding, precision, threads, memory, effective batch.

    Args:
        trainer: A trainer about to train.
    """
    for name, value in describe_active(trainer).items():
        logger.info("%-11s %s", name, value)


def describe_active(trainer: Trainer) -> dict[str, str]:
    """What a trainer really runs on, in words.

    Args:
        trainer: A trainer about to train.
    """
    args, accelerator = trainer.args, trainer.accelerator
    device = args.device.type
    name = torch.cuda.get_device_name() if device == "cuda" else device
    processes = f"{args.world_size} on {name}"
    if args.world_size > 1:
        processes += f", one group ({torch.distributed.get_backend()})"
    if trainer.is_fsdp_enabled:
        sharding = f"FSDP {getattr(accelerator.state.fsdp_plugin, 'fsdp_version', 1)}"
    elif trainer.is_deepspeed_enabled:
        sharding = f"DeepSpeed ZeRO stage {accelerator.state.deepspeed_plugin.zero_stage}"
    else:
        sharding = "none, every process holds the whole model"
    dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    best = hardware.precision()
    if dtype == "fp32":
        precision = f"fp32 ({best.reason})" if best.value == "fp32" else "fp32 (asked for)"
    else:
        precision = f"{dtype} mixed ({best.reason if best.value == dtype else 'asked for'})"
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    batch = (
        f"{sequences} sequences = {args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{args.world_size} process(es)"
    )
    length = getattr(args, "block_size", None) or getattr(args, "max_length", None)
    if length:
        batch += f"; {'' if hasattr(args, 'block_size') else 'up to '}{sequences * length:,} tokens"
    threads, memory = hardware.threads(), "-"
    if device == "cpu":
        kept = keep_freed_memory()
        memory = f"{'kept' if kept.value else 'given back'} when freed ({kept.reason})"
    return {
        "processes": processes,
        "sharding": sharding,
        "precision": precision,
        "threads": f"{torch.get_num_threads()} ({threads.reason})" if device == "cpu" else "-",
        "memory": memory,
        "compiled": str(bool(args.torch_compile)),
        "batch": batch,
    }
