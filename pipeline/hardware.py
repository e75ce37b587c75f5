"""What this machine can do, and what follows for a run: every choice comes with its reason, to be logged."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

COMPILATION_PAYS_AFTER = 120.0
"""Seconds of estimated training from which `torch.compile` earns back its warm-up of about half a minute."""


@dataclass(frozen=True)
class Choice:
    """A setting that the machine decided.

    Args:
        value: The setting.
        reason: Why, as a phrase to log.
    """

    value: Any
    reason: str


@cache
def accelerator() -> str | None:
    """Type of the accelerator that training would use (`"cuda"`, `"xpu"`, `"mps"`, ...); `None` on a CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return None
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None else None


@cache
def precision() -> Choice:
    """Mixed precision that is fastest here without loss of quality: `"bf16"`, `"fp16"` or `"fp32"`."""
    device = accelerator()
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", f"{torch.cuda.get_device_name()} computes in bfloat16")
        return Choice("fp16", f"{torch.cuda.get_device_name()} has no bfloat16")
    if device == "xpu":
        return Choice("bf16", "Intel GPUs compute in bfloat16")
    if device is not None:
        return Choice("fp32", f"mixed precision is not known to pay on {device}")
    capabilities = torch.cpu.get_capabilities()
    for feature, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "BF16 instructions")):
        if capabilities.get(feature):
            return Choice("bf16", f"this CPU has {name}")
    return Choice("fp32", "this CPU has no bfloat16 instructions: emulating them is slower than float32")


def supports(dtype: str) -> bool:
    """Whether the machine computes in `"bf16"`, `"fp16"` or `"fp32"` natively, as mixed precision in
    training."""
    if dtype == "fp16":
        return accelerator() in ("cuda", "xpu")
    return dtype == "fp32" or precision().value == dtype


def local_processes() -> int:
    """Number of training processes that share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@cache
def cores() -> int:
    """Physical cores that this process may use (two hardware threads of one core share its matrix units)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = torch.cpu.get_capabilities().get("num_physical_cores") or allowed
    return max(1, min(allowed, physical))


def threads() -> Choice:
    """CPU threads for one process's matrix multiplications."""
    # `accelerate launch` sets OMP_NUM_THREADS=1 where the launch file says nothing about threads, which on a
    # CPU leaves all cores but one idle. A larger number can only come from the user.
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if wanted.isdigit() and (int(wanted) > 1 or not launched):
        return Choice(int(wanted), "OMP_NUM_THREADS")
    share = max(1, cores() // local_processes())
    return Choice(share, f"{cores()} cores for {local_processes()} process(es)")


def compilation(flops: float) -> Choice:
    """Whether `torch.compile` pays for a training run of that size.

    Args:
        flops: Floating-point operations of the whole run, in this process.
    """
    if accelerator() is None and not (shutil.which("g++") or shutil.which("clang++")):
        return Choice(False, "no C++ compiler found")
    if accelerator() == "mps":
        return Choice(False, "not supported well on mps")
    seconds = flops / (0.25 * matmul_peak(precision().value))
    if seconds < COMPILATION_PAYS_AFTER:
        return Choice(False, f"about {seconds:.0f} s of training would not earn back the compilation")
    return Choice(True, f"about {seconds:.0f} s of training earn back the compilation")


@cache
def matmul_peak(dtype: str) -> float:
    """Speed of large matrix multiplications here, measured: what a perfect training loop could reach.

    A data sheet's peak is out of reach on most machines (clocks, power, shared cores), so utilisation is told
    against this. Takes about 0.2 s.

    Args:
        dtype: `"bf16"`, `"fp16"` or `"fp32"`.

    Returns:
        FLOP/s of one process, with the threads it has now.
    """
    device = accelerator() or "cpu"
    size = 1024 if device == "cpu" else 8192
    element = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    # Zeros would multiply no slower, and leave the global random state, which a run depends on, alone.
    a = torch.zeros(size, size, dtype=element, device=device)
    best = float("inf")
    started = time.perf_counter()
    for attempt in range(50):
        begin = time.perf_counter()
        torch.mm(a, a)
        if device != "cpu":
            torch.accelerator.synchronize()
        if attempt > 1:
            best = min(best, time.perf_counter() - begin)
        if attempt > 5 and time.perf_counter() - started > 0.2:
            break
    return 2 * size**3 / best


def training_defaults() -> dict[str, Choice]:
    """Fields of `TrainingArguments` that depend on the machine, for a user who set none of them."""
    device = accelerator()
    dtype = precision()
    defaults = {
        "bf16": Choice(dtype.value == "bf16", dtype.reason),
        "fp16": Choice(dtype.value == "fp16", dtype.reason),
    }
    if device is None:
        defaults["use_cpu"] = Choice(True, "no accelerator found")
        # Named without a group to form, it would make transformers wait for one that nobody founds.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            defaults["ddp_backend"] = Choice("gloo", "the backend of processes on CPUs")
        defaults["activation_checkpointing"] = Choice(False, "main memory is not what a CPU lacks")
        defaults["dataloader_pin_memory"] = Choice(False, "there is no accelerator to copy to")
    return defaults


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NEVER_TRIM = 2**31 - 1
"""Bytes that must be free at the end of the heap before they are given back: the most that `mallopt` takes."""
LARGEST_KEPT = (2**30, 2**25)
"""Bytes from which on a block is taken from the kernel and given back to it. Older releases refuse the first."""
OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables by which a user has decided otherwise."""


@cache
def keep_freed_memory() -> Choice:
    """Tell the allocator to keep what is freed, where it is glibc's and nobody has told it anything else.

    The process then holds its peak until it ends. The peak itself is higher: by a few percent in the recipes, by a
    third where the sizes of batches differ much.

    Returns:
        Whether freed memory is kept, and why.
    """
    if platform.libc_ver()[0] != "glibc":
        return Choice(False, "not glibc's allocator")
    if told := [name for name in OWN_SETTINGS if name in os.environ]:
        return Choice(False, f"{told[0]} is set")
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_TRIM_THRESHOLD, NEVER_TRIM) and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT)
    return Choice(bool(kept), "glibc would clear its pages anew in every step" if kept else "the allocator refused")
