"""What is active is told, what is not active is refused, and one run writes to a directory at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_model import ROOT
from transformers import TrainingArguments

from pipeline import files, hardware, launch
from pipeline.config import output_directory
from pipeline.errors import UserError


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True)


def test_nothing_is_wrong_with_one_process(args: TrainingArguments) -> None:
    assert launch.check_launch(args) == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WORLD_SIZE", "2", "num_processes: 2: only 1 would train together"),
        ("ACCELERATE_USE_FSDP", "true", "distributed_type: FSDP: is never active on CPUs"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type: DeepSpeed: is never active on CPUs"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision: fp16: this machine lacks it"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision: fp8: is not supported"),
    ],
)
def test_what_is_asked_for_and_not_active_is_refused(
    args: TrainingArguments, variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (problem,) = launch.check_launch(args)
    assert str(problem).startswith(said)


def test_a_group_of_one_is_left_and_a_group_of_two_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, left in (("1", True), ("2", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", "0")
        launch.leave_group_of_one()
        assert ("RANK" not in os.environ) is left


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 8),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2"}, 4),
        ({"OMP_NUM_THREADS": "2", "ACCELERATE_MIXED_PRECISION": "no"}, 2),
    ],
)
def test_launched_without_a_number_of_threads_all_cores_are_shared(
    environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hardware.threads().value == threads


def test_every_choice_has_a_reason() -> None:
    choices = {
        **hardware.training_defaults(),
        "threads": hardware.threads(),
        "compile": hardware.compilation(1e20),
    }
    assert all(choice.reason for choice in choices.values())
    assert hardware.compilation(1.0).value is False


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAIT_FOR_LOCK", 0.1)
    code = (
        "import sys, time; from pipeline.files import lock; held = lock(sys.argv[1]); "
        "print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another run writes there"):
            files.lock(str(tmp_path))
        other.kill()
        other.wait()
    started = time.monotonic()
    files.lock(str(tmp_path)).close()
    assert time.monotonic() - started < 30, "a killed run holds nothing"


def test_a_record_is_only_of_what_decides_the_weights(tmp_path: Path) -> None:
    def arguments(**changes: object) -> TrainingArguments:
        options: dict[str, Any] = {"use_cpu": True, "learning_rate": 1e-3, **changes}
        args = TrainingArguments(str(tmp_path), **options)
        setattr(args, output_directory.RESOLVED, output_directory.describe([args]))
        return args

    output_directory.claim(arguments(hub_token="hf_secret"))
    assert "hf_secret" not in (tmp_path / output_directory.RECORD).read_text()
    assert output_directory.check([arguments()]) == []
    assert output_directory.check([arguments(logging_steps=3, save_steps=7, eval_strategy="epoch")]) == []
    (problem,) = output_directory.check([arguments(learning_rate=2e-3, seed=1)])
    assert "learning_rate was 0.001 and is 0.002; seed was 42 and is 1" in str(problem)
