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
    return device.type if device is not None else None


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
    return torch.random.fork_rng([device], device_type=device.type) if device else torch.random.fork_rng([])


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
    return accelerator() in ("cuda", "xpu") if dtype == "fp16" else dtype == "fp32" or precision().value == dtype


def is_emulated(dtype: torch.dtype) -> bool:
    """Return whether the machine emulates products in `dtype`, which makes them slower than in float32."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return dtype in half and not supports(half[dtype])


def fast_dtype() -> torch.dtype:
    """Return bfloat16 if the machine has it, else float32, for products that need few digits: sampling and Muon."""
    return torch.bfloat16 if precision().value == "bf16" else torch.float32


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
        # The environment in which the user started the launcher, where it can be read.
        user: Mapping[str, str] = {}
        if is_launched():
            with suppress(psutil.Error, OSError):
                parents = (process.environ() for process in psutil.Process().parents())
                user = next((environment for environment in parents if not is_launched(environment)), user)
        if not is_launched() or value == user.get("OMP_NUM_THREADS"):
            return Choice(int(value), "OMP_NUM_THREADS")
        if int(value) > 1:
            return Choice(int(value), "num_cpu_threads_per_process of the launch file")
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return Choice(max(1, cores() // processes), f"{cores()} cores for {processes} process(es)")


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
    seconds = flops / (4e13 if accelerator() else 7.5e10 * threads().value)
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
        peak = f"{self.half / 1e12:.3g} TFLOP/s (float32: {single})" if self.half else f"{single} TFLOP/s"
        return f"{self.name}: {peak}, {self.memory / 1e9:.0f} GB"


def find_processor(gpu: str | None, tflops: float | None, gigabytes: float | None, processes: int) -> Processor | None:
    """Return a GPU by name or by both figures, by default this machine as measured; None if it is unknown."""
    if gpu or tflops or gigabytes:
        known = CARDS.get(re.sub("nvidia|geforce|rtx|[^a-z0-9]", "", (gpu or "").lower()), (0, 0, 0))
        half, single, memory = tflops or known[0], tflops or known[1], gigabytes or known[2]
        return Processor((gpu or "GPU").upper(), 1e12 * half, 1e12 * single, 1e9 * memory) if half and memory else None
    shared = 1 if accelerator() else processes
    memory = torch.cuda.mem_get_info()[1] if accelerator() == "cuda" else psutil.virtual_memory().total
    peaks = [matmul_peak(dtype) / shared for dtype in dict.fromkeys((precision().value, "fp32"))]
    return Processor("this machine", peaks[0] if len(peaks) > 1 else None, peaks[-1], memory / shared)


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


OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Variables with which users configure the allocator themselves."""


@cache
def keep_freed_memory() -> Choice:
    """Make glibc's allocator keep freed memory, unless the user has configured it.

    Its peak memory is a few percent higher, or a third if batch sizes vary a lot, and is kept until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return Choice(False, "not glibc's allocator")
    if configured := [name for name in OWN_SETTINGS if name in os.environ]:
        return Choice(False, f"{configured[0]} is set")
    mallopt = ctypes.CDLL(None).mallopt
    # M_TRIM_THRESHOLD of malloc.h: memory at the end of the heap is only returned to the kernel above this size.
    kept = mallopt(-1, 2**31 - 1)
    # M_MMAP_THRESHOLD: larger blocks are mapped, and returned to the kernel. Some releases reject the first size.
    kept = kept and any(mallopt(-3, size) for size in (2**30, 2**25))
    return Choice(bool(kept), "glibc would clear new pages in every step" if kept else "the allocator refused")
