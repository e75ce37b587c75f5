"""A disk that fills up while a checkpoint is written, on a real file system of a few megabytes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.training.checkpoint_folders import newest_complete
from tests.helpers.forked import Started
from tests.helpers.small_model import equal, recipe_command, run_recipe, weights

SIZE = 16 << 20
LEFT = 64 << 10
"""Bytes left free: less than a checkpoint takes."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system can only be mounted by root, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_one_checkpoint(small_disk: Path, tmp_path: Path) -> None:
    inputs, run = tmp_path / "inputs", small_disk / "run"
    more = ("--bf16", "false", "--max_steps", "60", "--eval_strategy", "no")
    whole = run_recipe("sft", inputs, *more, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr

    command = [sys.executable, *recipe_command("sft", inputs, *more, "--output_dir", str(run))]
    with Started(command) as process:
        while process.is_running and not (run / "checkpoint-2").exists():
            time.sleep(0.002)
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free - LEFT)
        assert process.wait() == 1
        errors = process.written()
    assert "Traceback" not in errors
    last = newest_complete(run)
    assert last is not None
    message = errors.strip().split("\n")[-1]
    assert "could not be written" in message and "the disk is full" in message, errors
    assert f"resumes from {last}" in message
    assert not (run / ".unfinished").exists(), "what was written of it is gone"

    filler.unlink()
    again = run_recipe("sft", inputs, *more, "--output_dir", str(run))
    assert again.returncode == 0, again.stderr
    assert f"resuming    from {last}" in again.stderr
    assert equal(weights(run), weights(tmp_path / "whole"))
