"""The whole project in miniature: one command runs everything up to the report, a second one finds nothing to do.

The steps typed by hand make the same run.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.__main__ import main
from tests.helpers.forked import run_forked
from tests.helpers.small_model import ROOT

SMOKE = ("run", "recipes/pocket", "--smoke", "--output_dir")
MODELS = ("0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo")
MEASURED = {
    **{stage: {"bits_per_byte", "instruction_accuracy", "stop_rate", "pass@1", "step_rate"} for stage in MODELS},
    "3_reward": {"reward_accuracy"},
}


TYPED = ("0_data", "0_tokenizer", "0_random", "1_pretrain", "2_sft", "evaluate_2_sft", "3_preferences")
"""Steps that are typed by hand as well; the evaluation of every stage is made in the same way."""
NEW = ("1_pretrain", "2_sft", "evaluate_2_sft", "3_preferences")
"""Steps that run in a new process, as in a terminal; the others run in forks, which saves seconds for each."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The directory of a smoke run of every stage, and how its command ended."""
    output = tmp_path_factory.mktemp("smoke") / "run"
    command = [sys.executable, "-m", "pipeline", *SMOKE, str(output)]
    return output, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_one_command_runs_every_stage_and_a_second_one_does_nothing(
    first: tuple[Path, subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output, done = first
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for command in ("python -m recipes.data", "-m recipes.pretrain", "-m recipes.grpo", "-m pipeline report"):
        assert f"{command} " in done.stdout, "each command is printed"
    assert len((done.stdout + done.stderr).splitlines()) < 80 and "\r" not in done.stdout + done.stderr

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
    monkeypatch.chdir(ROOT)
    assert main([*SMOKE, str(output)]) == 0
    out = capfd.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("[")]
    assert len(steps) == 16 and all(line.endswith(", skipped") for line in steps), out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux only")
def test_a_run_equals_the_same_steps_typed_by_hand(
    first: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Every weight, pair, answer and figure, bit for bit."""
    run, typed = first[0], tmp_path / "typed"
    steps = json.loads((run / "run.json").read_text())["steps"]
    for name in TYPED:
        program, *arguments = shlex.split(steps[name]["command"].replace(str(run), str(typed)))
        if program == "accelerate" and name in NEW:
            arguments = ["-m", "accelerate.commands.accelerate_cli", *arguments]
        elif program == "accelerate":
            arguments = ["-m", "pipeline.runner.launcher", *arguments[1:]]
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True) if name in NEW else run_forked(command)
        assert done.returncode == 0, (done.stdout, done.stderr)
    made = {Path(steps[name]["values"]["output_dir"]).name for name in TYPED if not name.startswith("evaluate")}
    paths = [path.relative_to(run) for path in run.rglob("*") if path.suffix in (".safetensors", ".jsonl", ".parquet")]
    compared = [path for path in paths if path.parts[0] in made or path == Path("evaluations/2_sft.jsonl")]
    assert {"data", "1_pretrain", "2_sft", "3_preferences", "evaluations"} <= {path.parts[0] for path in compared}
    for path in compared:
        assert (run / path).read_bytes() == (typed / path).read_bytes(), path
