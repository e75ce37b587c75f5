"""Freed memory is reused instead of requested from the kernel again, and compilation is for long runs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import hardware

ROOT = Path(__file__).parents[1]
FAULTS = """
import resource, torch
from pipeline import launch
from pipeline.hardware import keep_freed_memory
launch.prepare_process()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(4, 1 << 20).exp()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
kept = keep_freed_memory()
print(int(kept.value), faults, kept.reason)
"""
GLIBC = hardware.platform.libc_ver()[0] == "glibc"


def run(**environment: str) -> tuple[bool, int, str]:
    """Return whether memory was kept, page faults of 20 times 32 MiB, and the reason."""
    clean = {name: value for name, value in os.environ.items() if name not in hardware.ALLOCATOR_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=True
    )
    is_kept, faults, reason = done.stdout.split(maxsplit=2)
    return is_kept == "1", int(faults), reason.strip()


def test_freed_memory_is_reused() -> None:
    is_kept, faults, reason = run()
    assert is_kept == GLIBC and reason
    # A setting of the user's own, here glibc's default, is left alone.
    is_kept, more_faults, why = run(MALLOC_TOP_PAD_="131072")
    assert not is_kept and ("MALLOC_TOP_PAD_" in why) == GLIBC
    assert faults < more_faults / 4 or not GLIBC


def test_an_allocator_that_refuses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mallopt(self, parameter: int, value: int) -> int:
            return 0

    for name in hardware.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: Refusing())
    choice = hardware.keep_freed_memory.__wrapped__()
    assert choice.value is False and choice.reason


def test_compilation_is_for_long_runs_with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    monkeypatch.setattr(hardware, "threads", lambda: hardware.Choice(2, ""))
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/usr/bin/g++")
    # Pocket's pretraining, and ten times that
    assert not hardware.compilation(1e13).value and hardware.compilation(1e14).value
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert not hardware.compilation(1e14).value


def test_measuring_the_peak_takes_no_random_numbers_from_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    state = torch.get_rng_state()
    assert hardware.matmul_peak.__wrapped__("fp32") > 1e6
    assert torch.equal(torch.get_rng_state(), state)


def test_the_peak_is_not_measured_on_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros let a GPU clock higher."""
    factors: list[torch.Tensor] = []
    multiply = torch.mm

    def record(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        factors.append(a)
        return multiply(a, b)

    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    monkeypatch.setattr(torch, "mm", record)
    hardware.matmul_peak.__wrapped__("fp32")
    assert factors[0].count_nonzero() > factors[0].numel() / 2


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_random_state_of_any_accelerator_is_restored(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ["before"]
    device = SimpleNamespace(
        get_rng_state=lambda device: states[-1], set_rng_state=lambda state, device: states.append(state)
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    on_cpu = torch.get_rng_state()
    with hardware.unchanged_rng():
        torch.rand(1)
        states.append("seeded")
    assert states[-1] == "before" and torch.equal(torch.get_rng_state(), on_cpu)
