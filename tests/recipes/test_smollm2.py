"""The recipe for a real chat model, on a small one in its place."""

import json
from pathlib import Path

import pytest

from pipeline.__main__ import main
from tests.helpers.small_model import ROOT, save_model

LONGER = "def longer(completions, **columns):\n    return [len(answer[-1]['content']) for answer in completions]\n"


@pytest.mark.slow
@pytest.mark.usefixtures("shared_warm_process")
def test_a_copy_takes_every_stage_and_is_measured_with_every_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "models/smollm2")
    assert main(["copy", "smollm2", "mine"]) == 0
    # A model that has learned nothing solves no problem, so that the verifier would prefer no answer.
    Path("longer.py").write_text(LONGER)
    monkeypatch.syspath_prepend(tmp_path)
    preferences = Path("mine/3_preferences.yaml")
    verifier = "judge: pipeline.rewards.functions:reasoning_gym"
    assert verifier in preferences.read_text()
    preferences.write_text(preferences.read_text().replace(verifier, "judge: longer:longer"))
    # The small model does not have the layers 20 to 29.
    reward = Path("mine/3_reward.yaml")
    assert "layers" in reward.read_text()
    reward.write_text(reward.read_text().replace(r"'.*\.layers\.2\d\..*_proj'", "all-linear"))

    assert main(["run", "mine", "--smoke", "--config_file", str(ROOT / "accelerate_config.yaml")]) == 0

    metrics = json.loads(Path("runs/mine-smoke/report/metrics.json").read_text())
    assert list(metrics["stages"]) == ["0_base", "2_sft", "3_reward", "3_ppo", "4_grpo"]
    assert set(metrics["baselines"]) == {"elicited", "majority", "best_of_4"}
    assert metrics["baselines"]["best_of_4"]["text"] == "4 answers" and "pass@1" in metrics["baselines"]["best_of_4"]
    assert metrics["stages"]["4_grpo"]["answer_bits_per_byte"]["n"] == 8
