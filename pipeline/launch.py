"""Setup of a process, and a check of the launch file against what is active."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import hardware
from pipeline.errors import Problem, RunStopped, UserError, refuse, signal_with_parent

# Importing them takes seconds, too long for `--help`.
if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)

SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""Ways of splitting a model over processes, and the environment variables by which a launch file requests them."""


def prepare_process(*, shards: bool = False) -> None:
    """Prepare a process before it builds its training arguments: telemetry, logs, CPU, and ending with its launcher.

    Args:
        shards: Whether the arguments ask for FSDP or DeepSpeed; a launch file may also do so.

    Raises:
        UserError: If some variables of a process group are missing, so that it would wait for others forever.
    """
    _check_group_variables()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants

    # The Hub client reads the variable when it is imported, which may have happened earlier.
    constants.HF_HUB_DISABLE_TELEMETRY = os.environ["HF_HUB_DISABLE_TELEMETRY"].upper() in ("1", "ON", "YES", "TRUE")
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    is_first = os.environ.get("RANK", "0") == "0"
    for package in ("pipeline", "recipes"):
        logging.getLogger(package).setLevel("INFO" if is_first else "WARNING")
    quiet_libraries()
    if hardware.accelerator() is None:
        torch.set_num_threads(hardware.threads().value)
        hardware.keep_freed_memory()
    # A worker whose launcher was killed would otherwise continue to train, and write where the next run writes. On
    # systems other than Linux, the lock on the output directory makes the next run wait.
    if hardware.is_launched() and sys.platform == "linux":
        signal_with_parent(signal.SIGTERM)()
    # The launch file puts even a single process into a group, which would prevent compilation. Only sharding needs it.
    is_sharded = hardware.accelerator() is not None and (shards or any(map(is_sharded_by, SHARDING)))
    if os.environ.get("WORLD_SIZE") == "1" and not is_sharded:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)


def _check_group_variables() -> None:
    """Raise a `UserError` if this is one of several processes and variables of their group are missing."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
    if missing:
        remedy = f"is set without {' and '.join(missing)}; use `accelerate launch`, or unset it"
        raise UserError(Problem("WORLD_SIZE", size, remedy))


_prepared = itertools.count()


@contextmanager
def once_per_node(args: TrainingArguments) -> Iterator[None]:
    """Let the first process of each node prepare data before the others, which find the result in the cache.

    They wait for a lock: a barrier would end the run after `ddp_timeout`, half an hour.
    """
    if args.world_size == 1:
        yield
        return
    # Windows lacks it, but also imports this module.
    import fcntl

    from accelerate import PartialState

    #     first process   open, lock   wait_for_everyone   delete the name   prepare   unlock
    #     others          open         wait_for_everyone   lock (waits)                          read the cache
    #
    # After the barrier, all processes have the file, and nobody needs its name any more, which would be left in the
    # temporary folder. Nodes may share the folder, and launchers of one group may share a node.
    state = PartialState()
    node = f"{socket.gethostname()}-{os.environ.get('GROUP_RANK')}"
    name = f"fourstage-{os.getuid()}-{node}-{os.environ.get('MASTER_PORT')}-{next(_prepared)}.lock"
    path = Path(tempfile.gettempdir()) / name
    # Other users may write to the folder, so that links are not followed.
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        if state.is_local_main_process:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            state.wait_for_everyone()
            path.unlink(missing_ok=True)
        else:
            state.wait_for_everyone()
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        # Unlocking explicitly releases the lock even if children still have the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def quiet_libraries() -> None:
    """Silence library output that users can do nothing about, except for download progress bars."""
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    shows_downloads = not are_progress_bars_disabled()
    # This also hides the Hub client's progress bars, which are wanted.
    transformers_logging.disable_progress_bar()
    if shows_downloads:
        enable_progress_bars()


def is_sharded_by(sharding: str) -> bool:
    """Return whether the launch file splits the model by "FSDP" or "DeepSpeed", keys of `SHARDING`."""
    return os.environ.get(SHARDING[sharding], "false").lower() == "true"


def use_one_gpu(args: TrainingArguments) -> None:
    """Train on one GPU if there is no process group: change `args` in place."""
    # transformers would use every visible GPU, and multiply the batch by their number, at the same learning rate.
    if args.n_gpu > 1:
        args._n_gpu = 1


@contextmanager
def stop_as_one() -> Iterator[None]:
    """If another process was lost because it stopped and reported why, exit silently with the same code."""
    # Key in the process group's store under which a stopping process leaves its exit code.
    key = "fourstage/stopped"
    try:
        yield
    except (RunStopped, RuntimeError) as error:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise
        store = torch.distributed.distributed_c10d._get_default_store()
        if isinstance(error, RunStopped):
            store.set(key, str(error.exit_code))
            raise
        code = None
        # The process that serves the store may have ended without a reason.
        with contextlib.suppress(RuntimeError):
            if store.check([key]):
                code = int(store.get(key))
        if code is None:
            raise
        sys.exit(code)


def check_launch(args: TrainingArguments) -> list[Problem]:
    """Return settings of the launch file that are not active in the process group."""
    problems: list[Problem] = []
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        remedy = f"only {args.world_size} would train together; on CPUs, omit use_cpu and ddp_backend"
        problems.append(Problem("num_processes", launched, remedy))
    problems += _check_sharding(args)
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision in ("bf16", "fp16") and not hardware.supports(precision):
        best = hardware.precision()
        remedy = f"this machine lacks it; set it to `no` to use {best.value} ({best.reason})"
        problems.append(Problem("mixed_precision", precision, remedy))
    if precision == "fp8":
        problems.append(Problem("mixed_precision", precision, "is not supported by the recipes; set it to `no`"))
    return problems


def _check_sharding(args: TrainingArguments) -> list[Problem]:
    """Return requests for sharding, of which accelerate silently ignores those of a process that cannot shard."""
    if args.device.type == "cpu":
        reason = "is never active on CPUs, so the model would not be sharded"
    elif args.parallel_mode.value != "distributed":
        reason = "needs a process group, even for one process; start it by `accelerate launch`"
    else:
        return []
    problems: list[Problem] = []
    for name in SHARDING:
        value = getattr(args, name.lower(), None)
        if is_sharded_by(name):
            problems.append(Problem("distributed_type", name, f"{reason}; or use accelerate_config.yaml"))
        elif value:
            problems.append(Problem(name.lower(), value, f"{reason}; or omit it"))
    return problems


def check_active(trainer: Trainer) -> None:
    """Compare the requested sharding with the trainer's. Raise a `UserError` if it is not active."""
    active = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    remedy = "is not active on this machine, so the model would not be sharded; use accelerate_config.yaml"
    problems: list[Problem] = []
    for name in SHARDING:
        is_requested = is_sharded_by(name) or getattr(trainer.args, name.lower(), None)
        if is_requested and not active[name]:
            problems.append(Problem("distributed_type", name, remedy))
    refuse(*problems)


def log_active(trainer: Trainer) -> None:
    """Log what a trainer is about to run on, and its precision and batch size."""
    args = trainer.args
    logger.info("processes   %s", _describe_processes(args))
    logger.info("sharding    %s", _describe_sharding(trainer))
    logger.info("precision   %s", _describe_precision(args))
    log_threads()
    if args.device.type == "cpu":
        memory = hardware.keep_freed_memory()
        logger.info("memory      %s when freed (%s)", "kept" if memory.value else "returned", memory.reason)
    logger.info("compiled    %s", bool(args.torch_compile))
    logger.info("batch       %s", _describe_batch(args))


def _describe_processes(args: TrainingArguments) -> str:
    """Return how many processes train on what: "2 on cpu, one group (gloo)"."""
    if args.device.type != "cuda":
        text = f"{args.world_size} on {args.device.type}"
        visible = 1
    else:
        text = f"{args.world_size} on {torch.cuda.get_device_name()}"
        visible = torch.cuda.device_count()
    if args.world_size > 1:
        return f"{text}, one group ({torch.distributed.get_backend()})"
    if visible > 1:
        return f"{text}, one of {visible} GPUs: a process trains on one, `--num_processes {visible}` on all of them"
    return text


def _describe_sharding(trainer: Trainer) -> str:
    """Return how the trainer splits the model over the processes."""
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        return f"FSDP {state.fsdp_plugin.fsdp_version}"
    if trainer.is_deepspeed_enabled:
        return f"DeepSpeed ZeRO stage {state.deepspeed_plugin.zero_stage}"
    return "none, every process has the whole model"


def _describe_precision(args: TrainingArguments) -> str:
    """Return the precision and its reason: "bf16 mixed (this CPU has AMX)"."""
    dtype = "fp32"
    if args.bf16:
        dtype = "bf16"
    elif args.fp16:
        dtype = "fp16"
    best = hardware.precision()
    reason = best.reason if best.value == dtype else "requested"
    mixed = "" if dtype == "fp32" else " mixed"
    return f"{dtype}{mixed} ({reason})"


def _describe_batch(args: TrainingArguments) -> str:
    """Return the size of a batch: "16 sequences = 8 x 1 accumulated x 2 process(es); up to 8,192 tokens"."""
    size = args.train_batch_size
    steps = args.gradient_accumulation_steps
    sequences = size * steps * args.world_size
    text = f"{sequences} sequences = {size} x {steps} accumulated x {args.world_size} process(es)"
    if getattr(args, "block_size", None):
        return f"{text}; {sequences * args.block_size:,} tokens"
    if getattr(args, "max_length", None):
        at_most = "" if hasattr(args, "block_size") else "up to "
        return f"{text}; {at_most}{sequences * args.max_length:,} tokens"
    return text


def log_threads() -> None:
    """Log the number of CPU threads and its reason, unless there is an accelerator."""
    if hardware.accelerator() is None:
        logger.info("threads     %d (%s)", torch.get_num_threads(), hardware.threads().reason)
