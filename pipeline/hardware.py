"""Settings that depend on the machine: precision, threads, memory and compilation, each with a reason to log."""

import ctypes
import os
import platform
import re
import shutil
import timeit
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache
from typing import Any, NamedTuple

import psutil
import torch


class Choice(NamedTuple):
    """A setting chosen for this machine, and why, as a phrase to log."""

    value: Any
    reason: str


@cache
def accelerator() -> str | None:
    """Return the type of the accelerator to train on ("cuda", "xpu", "mps", ...), or None on a CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return None
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    return device.type


def keep_to_cpu() -> None:
    """Use the CPU from now on, even if there is an accelerator."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator.cache_clear()
    precision.cache_clear()


def unchanged_rng() -> AbstractContextManager[None]:
    """Restore torch's random state on the CPU and on this process's accelerator at the end of the block.

    `torch.manual_seed` seeds every kind of device. By default, `fork_rng` would initialise all visible devices.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@cache
def precision() -> Choice:
    """Return the fastest precision that does not cost quality on this machine: "bf16", "fp16" or "fp32"."""
    device = accelerator()
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", f"{name} computes in bfloat16")
        return Choice("fp16", f"{name} does not have bfloat16")
    if device == "xpu":
        return Choice("bf16", "Intel GPUs compute in bfloat16")
    if device is not None:
        return Choice("fp32", f"mixed precision is not known to be faster on {device}")
    # Without such instructions, torch converts each operand to float32 and back, which costs more than it saves.
    capabilities = torch.cpu.get_capabilities()
    for feature, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16"), ("bf16", "BF16 instructions")):
        if capabilities.get(feature):
            return Choice("bf16", f"this CPU has {name}")
    return Choice("fp32", "this CPU lacks bfloat16 instructions; emulating them is slower than float32")


def supports(dtype: str) -> bool:
    """Return whether the machine trains natively in `dtype`: "bf16", "fp16" or "fp32"."""
    if dtype == "fp16":
        return accelerator() in ("cuda", "xpu")
    return dtype == "fp32" or precision().value == dtype


def is_emulated(dtype: torch.dtype) -> bool:
    """Return whether the machine emulates products in `dtype`, which makes them slower than in float32."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return dtype in half and not supports(half[dtype])


def fast_dtype() -> torch.dtype:
    """Return bfloat16 if the machine has it, else float32, for products that need few digits: sampling and Muon."""
    return torch.bfloat16 if precision().value == "bf16" else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of many numbers on a device: float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@cache
def cores() -> int:
    """Return the physical cores that this process may use; hardware threads of one core share its matrix units."""
    allowed = os.cpu_count() or 1
    # In a container or a job of a cluster, the process may use fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, torch.cpu.get_capabilities().get("num_physical_cores") or allowed))


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether an environment was set up by `accelerate launch` or `torchrun`."""
    return "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment


def threads() -> Choice:
    """Return the CPU threads of one process: its share of the physical cores, unless the user chose a number."""
    # Launchers set OMP_NUM_THREADS=1 unless the user chose a number, which would leave all cores but one idle.
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0:
        if not is_launched() or value == _users_environment().get("OMP_NUM_THREADS"):
            return Choice(int(value), "OMP_NUM_THREADS")
        if int(value) > 1:
            return Choice(int(value), "num_cpu_threads_per_process of the launch file")
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Choice(max(1, cores() // processes), f"{cores()} cores for {processes} process(es)")


def _users_environment() -> Mapping[str, str]:
    """Return the environment in which the user started the launcher of this process, {} if it cannot be read."""
    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            environment = process.environ()
            if not is_launched(environment):
                return environment
    return {}


def attention() -> Choice:
    """Return the attention to train with (`pipeline.models.kernels.attention`), or None to let transformers choose."""
    if accelerator() is None:
        return Choice("blockwise", "CPU kernels also compute scores between documents, which are then masked")
    if accelerator() == "cuda" and precision().value == "bf16":
        return Choice("varlen", "FlashAttention reads each document alone")
    return Choice(None, "FlashAttention needs CUDA and bfloat16")


def compilation(flops: float) -> Choice:
    """Return whether `torch.compile` would shorten a training run of `flops` floating-point operations per process.

    Nothing is measured, so that every start of the same run makes the same choice.
    """
    if accelerator() is None and not (shutil.which("g++") or shutil.which("clang++")):
        return Choice(False, "no C++ compiler found")
    if accelerator() == "mps":
        return Choice(False, "not well supported on mps")
    # Training speed with a small model: cores with AMX or AVX512-BF16 reach 6e10 to 9e10 FLOP/s.
    speed = 4e13 if accelerator() else 7.5e10 * threads().value
    seconds = flops / speed
    # Compilation saves a tenth of the training time, but takes longer to warm up.
    if seconds < 180:
        return Choice(False, f"about {seconds:.0f} s of training would not make up for the compilation")
    return Choice(True, f"about {seconds:.0f} s of training make up for the compilation")


CARDS = {
    "b200": (2250, 75, 180), "h200": (989, 67, 141), "h100": (989, 67, 80), "a100": (312, 19.5, 80),
    "l40s": (362, 91.6, 48), "l4": (121, 30.3, 24), "a10": (125, 31.2, 24), "a10g": (70, 35, 24),
    "v100": (125, 15.7, 32), "t4": (65, 8.1, 16), "4090": (165, 82.6, 24), "3090": (71, 35.6, 24),
}  # fmt: skip
"""Peak in TFLOP/s, in 16 bits without sparsity and in float32, and GB of memory, from NVIDIA's data sheets."""


class Processor(NamedTuple):
    """FLOP/s of a process in 16 bits (None if not faster) and in float32, and its memory in bytes."""

    name: str
    half: float | None
    single: float
    memory: float

    def __str__(self) -> str:
        single = f"{self.single / 1e12:.3g}"
        peak = f"{single} TFLOP/s"
        if self.half:
            peak = f"{self.half / 1e12:.3g} TFLOP/s (float32: {single})"
        return f"{self.name}: {peak}, {self.memory / 1e9:.0f} GB"


def find_processor(gpu: str | None, tflops: float | None, gigabytes: float | None, processes: int) -> Processor | None:
    """Return the processor of one process.

    Args:
        gpu: Name of a GPU, such as "h100" or "RTX 4090".
        tflops: Its peak in TFLOP/s, for a GPU that is not among `CARDS`.
        gigabytes: Its memory in GB, likewise.
        processes: Processes that share this machine's CPU.

    Returns:
        The GPU or, without the first three, this machine as measured; None if the GPU is unknown.
    """
    if not (gpu or tflops or gigabytes):
        return _measure_processor(processes)
    name = re.sub("nvidia|geforce|rtx|[^a-z0-9]", "", (gpu or "").lower())
    half_tflops, single_tflops, card_gigabytes = CARDS.get(name, (0, 0, 0))
    half = 1e12 * (tflops or half_tflops)
    single = 1e12 * (tflops or single_tflops)
    memory = 1e9 * (gigabytes or card_gigabytes)
    if not half or not memory:
        return None
    return Processor((gpu or "GPU").upper(), half, single, memory)


def _measure_processor(processes: int) -> Processor:
    """Return what one of several processes has of this machine: a GPU, or its share of the CPU."""
    memory = psutil.virtual_memory().total
    if accelerator() == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    # An accelerator is for one process.
    sharing = 1 if accelerator() else processes
    single = matmul_peak("fp32") / sharing
    half = None
    dtype = precision().value
    if dtype != "fp32":
        half = matmul_peak(dtype) / sharing
    return Processor("this machine", half, single, memory / sharing)


@cache
def matmul_peak(dtype: str) -> float:
    """Measure the FLOP/s of large matrix products in "bf16", "fp16" or "fp32", which stay below a data sheet's peak."""
    device = accelerator() or "cpu"
    size = 1024 if device == "cpu" else 8192
    element = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    # A GPU at its power limit multiplies zeros faster. Do not use the global random state, which runs depend on.
    a = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), dtype=element, device=device)

    def multiply() -> None:
        torch.mm(a, a)
        if device != "cpu":
            torch.accelerator.synchronize()

    return 2 * size**3 / min(timeit.repeat(multiply, number=1, repeat=6))


def training_defaults() -> dict[str, Choice]:
    """Return the fields of `TrainingArguments` that depend on the machine, for users who did not set them."""
    dtype = precision()
    defaults = {name: Choice(dtype.value == name, dtype.reason) for name in ("bf16", "fp16")}
    if accelerator() is None:
        defaults["use_cpu"] = Choice(True, "no accelerator found")
        # With a single process, `ddp_backend` makes transformers wait for a group that never forms.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            defaults["ddp_backend"] = Choice("gloo", "the backend for CPUs")
        defaults["activation_checkpointing"] = Choice(False, "CPUs rarely run out of memory")
        defaults["dataloader_pin_memory"] = Choice(False, "no accelerator to copy to")
    return defaults


ALLOCATOR_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables with which users configure the allocator themselves."""


@cache
def keep_freed_memory() -> Choice:
    """Make glibc's allocator keep freed memory, unless the user has configured it.

    Its peak memory is a few percent higher, or a third if batch sizes vary a lot, and is kept until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return Choice(False, "not glibc's allocator")
    for name in ALLOCATOR_VARIABLES:
        if name in os.environ:
            return Choice(False, f"{name} is set")
    mallopt = ctypes.CDLL(None).mallopt
    # M_TRIM_THRESHOLD of malloc.h: memory at the end of the heap is only returned to the kernel above this size.
    is_set = bool(mallopt(-1, 2**31 - 1))
    # M_MMAP_THRESHOLD: larger blocks are mapped, and returned to the kernel. Some releases reject the first size.
    is_set = is_set and any(mallopt(-3, size) for size in (2**30, 2**25))
    if not is_set:
        return Choice(False, "the allocator refused")
    return Choice(True, "glibc would clear new pages in every step")
