"""Every test runs offline, sends nothing, and leaves no trace outside of its temporary directory."""

import gc
import os
from typing import TYPE_CHECKING

# The libraries read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest

if TYPE_CHECKING:
    from torch import Tensor


def pytest_collection_finish() -> None:
    """Keep the million objects of imported modules from being traversed whenever a trainer frees memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def unconfined_where_the_kernel_cannot() -> None:
    """Grade the code of the tests, which is harmless, also where the kernel cannot confine it."""
    from pipeline.rewards.sandbox import run

    run.allow_unconfined = run.validate_sandbox() is not None


@pytest.fixture(autouse=True)
def no_test_keeps_the_next_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what `use_cpu` of an earlier test said: `hardware.keep_to_cpu` says it to the whole process."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


@pytest.fixture
def shared_warm_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the steps of `fourstage run` from the process of this worker: importing the libraries takes seconds.

    Not for tests that change what libraries read when they are imported, such as HF_HOME.
    """
    from contextlib import nullcontext

    from tests.helpers.forked import ROOT, warm_process

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("pipeline.runner.cli.WarmProcess", lambda environment: nullcontext(warm_process()))


@pytest.fixture(params=["bf16", "fp32"])
def torchs_muon(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the machine for one with or without bfloat16: without, torch's Muon gets its definition in float32."""
    from pipeline import hardware

    def newton_schulz(grad: "Tensor", coefficients: tuple[float, float, float], steps: int, eps: float) -> "Tensor":
        if grad.shape[0] > grad.shape[1]:
            return newton_schulz(grad.T, coefficients, steps, eps).T
        a, b, c = coefficients
        x = grad / grad.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    monkeypatch.setattr(hardware, "precision", lambda: hardware.Choice(request.param, ""))
    if request.param == "fp32":
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)
