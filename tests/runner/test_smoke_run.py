"""The whole project in miniature: one command runs everything up to the report, a second one finds nothing to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

MODELS = ("0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo")
MEASURED = {
    **{stage: {"bits_per_byte", "instruction_accuracy", "stop_rate", "pass@1", "step_rate"} for stage in MODELS},
    "3_reward": {"reward_accuracy"},
}


def smoke(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "run", "recipes/pocket", "--smoke", "--output_dir", str(output)]
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_one_command_runs_every_stage_and_a_second_one_does_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = smoke(output)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for command in ("python -m recipes.data", "-m recipes.pretrain", "-m recipes.grpo", "-m pipeline report"):
        assert f"{command} " in first.stdout, "each command is printed"
    assert len((first.stdout + first.stderr).splitlines()) < 80 and "\r" not in first.stdout + first.stderr

    metrics = json.loads((output / "report" / "metrics.json").read_text())
    assert set(metrics["stages"]) == set(MEASURED)
    for stage, names in MEASURED.items():
        assert names <= set(metrics["stages"][stage]), stage
        for name, measured in metrics["stages"][stage].items():
            if name == "pass@1_by_length":
                continue
            low, high = measured["ci95"]
            assert low <= measured["value"] <= high and measured["n"] >= 1
    assert {"3_ppo", "4_grpo"} <= {stage for stage, found in metrics["stages"].items() if "win_rate" in found}
    assert set(metrics["seconds"]) >= {"1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo"}
    assert metrics["seed"] == 0 and metrics["hardware"] and metrics["versions"]["transformers"]

    page = (output / "report" / "index.html").read_text()
    assert "What is an LLM?" in page
    assert "http://" not in page.split("<body")[0] and "https://" not in page.split("<body")[0], "opens from disk"

    sizes = set()
    for stage in MODELS:
        model = AutoModelForCausalLM.from_pretrained(output / stage)
        assert len(AutoTokenizer.from_pretrained(output / stage)) == model.config.vocab_size
        sizes.add(model.num_parameters())
    assert len(sizes) == 1
    assert AutoModelForSequenceClassification.from_pretrained(output / "3_reward").config.num_labels == 1

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    second = smoke(output)
    assert second.returncode == 0, second.stderr
    steps = [line for line in second.stdout.splitlines() if line.startswith("[")]
    assert len(steps) == 16 and all(line.endswith(", skipped") for line in steps), second.stdout
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
