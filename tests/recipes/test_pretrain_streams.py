"""Pretraining on a stream: two processes train as one does, and a run that is resumed, twice, is an undisturbed one.

So is one on the tokens of the documents, made beforehand.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.files import write_rows
from tests.helpers.forked import RANKS, run_forked
from tests.helpers.small_model import TEXT, equal, recipe_command, weights


def train(inputs: Path, output: Path, processes: int, *more: str) -> str:
    data = inputs / "files"
    if not data.exists():
        data.mkdir(parents=True)
        for file in range(2):
            write_rows(data / f"{file}.jsonl", [{"text": f"{file} {row}: {TEXT * (row % 3)}"} for row in range(700)])
    options = ["--dataset_name", str(data), "--dataset_streaming", "--max_eval_samples", "20", "--output_dir"]
    batch = ["--per_device_train_batch_size", str(64 // processes), "--max_steps", "6"]
    saves = ["--eval_steps", "6", "--save_total_limit", "3"]
    launch = [*RANKS, "2"] if processes == 2 else []
    arguments = recipe_command("pretrain", inputs, *options, str(output), *batch, *saves, *more)
    result = run_forked([sys.executable, *launch, *arguments])
    assert result.returncode == 0, result.stderr
    return result.stderr


def stop_after(output: Path, step: int) -> None:
    """Leave what a run that was killed after `step` leaves."""
    (output / "model.safetensors").unlink()
    for checkpoint in output.glob("checkpoint-*"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)


def history(output: Path) -> list[dict[str, float]]:
    logged = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in ("loss", "epoch", "step")} for entry in logged if "loss" in entry]


def test_two_processes_train_as_one_and_resumed_runs_are_undisturbed(tmp_path: Path) -> None:
    inputs, one, two = tmp_path / "inputs", tmp_path / "one", tmp_path / "two"
    train(inputs, one, 1)
    said = train(inputs, two, 2)
    assert "lanes 2; each process tokenizes one document in 2" in said
    assert len(history(one)) == 6
    assert [entry["loss"] for entry in history(two)] == pytest.approx([e["loss"] for e in history(one)], rel=2e-3)
    undisturbed, logged = weights(one), history(one)
    for step in (2, 4):
        stop_after(one, step)
        assert f"checkpoint-{step}" in train(inputs, one, 1)
        assert equal(weights(one), undisturbed) and history(one) == logged
    pytest.importorskip("datatrove")
    documents, words, shards = str(inputs / "files"), str(inputs / "tokenizer"), str(tmp_path / "shards")
    names = ["--dataset_name", documents, "--tokenizer_name_or_path", words, "--output_dir", shards, "--workers", "1"]
    result = run_forked([sys.executable, "-m", "recipes.shards", *names])
    assert result.returncode == 0, result.stderr
    train(inputs, tmp_path / "three", 1, "--dataset_name", shards)
    assert equal(weights(tmp_path / "three"), undisturbed) and history(tmp_path / "three") == logged
