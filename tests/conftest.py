"""Every test runs offline, sends nothing, and leaves no trace outside of its temporary directory."""

import os

# before any test imports the libraries that read them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest


@pytest.fixture(autouse=True, scope="session")
def unconfined_where_the_kernel_cannot() -> None:
    """Grade the code of the tests, which is harmless, also where the kernel cannot confine it."""
    from pipeline.rewards.sandbox import run

    run.allow_unconfined = run.validate_sandbox() is not None
