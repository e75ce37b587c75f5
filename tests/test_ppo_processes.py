"""Two processes train what one trains: gradients, policy, critic and metrics agree on the same rollouts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
# Sums are made in another order, and padding differs; nothing else does.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def run(processes: int, output_dir: Path) -> dict[str, Any]:
    """Train, and return what `tests/ppo_two_processes.py` saw."""
    launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"] if processes == 2 else []
    if processes == 1:
        launch = ["--num_processes", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "tests.ppo_two_processes"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    result = subprocess.run(
        [*command, str(output_dir), str(4 // processes)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(output_dir / "seen.pt", weights_only=True)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    one, two = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)

    assert len(one["gradients"]) == len(two["gradients"]) == 6
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    for name in ("model.safetensors", "value_model/model.safetensors"):
        a, b = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], **TOLERANCE)

    measured = ("objective", "policy", "val/", "loss", "reward", "grad_norm")
    for a, b in zip(one["log"][:-1], two["log"][:-1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(measured):
                assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-4), name

    # In the middle of a rollout, each process finds its own half again.
    before = load_file(tmp_path / "two" / "value_model/model.safetensors")
    assert len(list((tmp_path / "two" / "checkpoint-3").glob("rollout_*.safetensors"))) == 2
    run(2, tmp_path / "two")
    after = load_file(tmp_path / "two" / "value_model/model.safetensors")
    for key in before:
        torch.testing.assert_close(before[key], after[key], rtol=0, atol=0)
