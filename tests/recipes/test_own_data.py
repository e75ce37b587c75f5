"""The whole path on rows of the tests: text, questions and pairs in a folder; stages 2 to 4 for an existing model."""

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.__main__ import main
from pipeline.models.scratch import ScratchArguments, build_model
from tests.helpers.small_model import CHATML, ROOT, conversation, tokenizer, write_data

LINES = "Wer reitet so spät durch Nacht und Wind?\nEs ist der Vater mit seinem Kind;\n\n"
QUESTIONS = [
    {"question": f"Wie viel ist {i} + {i % 7}?", "answer": f"{i} + {i % 7} = {i + i % 7}\n#### {i + i % 7}"}
    for i in range(100)
]
LONG = {"question": "Warum? " * 2000, "answer": "Darum.\n#### 0"}
SYSTEM = {"role": "system", "content": "Antworte kurz."}
PAIRS = [
    {
        "chosen": [SYSTEM, *conversation(f"Wer bist du, {i}?", f"Ich bin {i}.")],
        "rejected": [SYSTEM, *conversation(f"Wer bist du, {i}?", "Nein." * (i % 5 + 1))],
    }
    for i in range(100)
]


@pytest.fixture
def smoke(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_warm_process: None
) -> Callable[[str], dict[str, Any]]:
    """What runs two steps of every stage of a shipped folder in `tmp_path`, and returns what the report says."""

    def smoke(recipe: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        launch = ["--config_file", str(ROOT / "accelerate_config.yaml")]
        assert main(["run", str(ROOT / "recipes" / recipe), "--smoke", *launch]) == 0
        (file,) = tmp_path.glob("runs/*/report/metrics.json")
        metrics: dict[str, Any] = json.loads(file.read_text())
        return metrics

    return smoke


@pytest.mark.slow
def test_a_folder_of_yaml_runs_on_files_of_ones_own(tmp_path: Path, smoke: Callable[[str], dict[str, Any]]) -> None:
    for name in ("text", "questions", "pairs"):
        (tmp_path / "data" / name).mkdir(parents=True)
    with gzip.open(tmp_path / "data" / "text" / "ballads.txt.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{i}. {LINES}" for i in range(2000))
    with (tmp_path / "data" / "questions" / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows([*QUESTIONS, LONG])
    Dataset.from_list(PAIRS).to_parquet(tmp_path / "data" / "pairs" / "train.parquet")

    metrics = smoke("gsm8k-shakespeare")

    stages = metrics["stages"]
    assert set(metrics["baselines"]) == {"constant", "elicited", "majority"}
    models = ["0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo"]
    assert set(stages) == {*models, "3_reward", "3_judge"}
    for stage in ("3_reward", "3_judge"):
        assert {"value", "ci95", "n"} <= set(stages[stage]["reward_accuracy"])
    assert "win_rate" in stages["3_ppo"], "by the judge that PPO did not train against"
    for stage in models:
        assert {"bits_per_byte", "stop_rate", "pass@1"} <= set(stages[stage]), stage
        assert 0 < stages[stage]["bits_per_byte"]["value"] < 20, stage


@pytest.mark.slow
def test_every_method_of_preference_tuning_is_measured_beside_the_others(
    smoke: Callable[[str], dict[str, Any]],
) -> None:
    metrics = smoke("pocket-preferences")
    stages = metrics["stages"]
    assert {"2_sft", "3_reward", "3_ppo", "3_dpo", "3_sft_preferred", "3_sft_chance"} < set(stages)
    assert {"constant", "best_of_4", "best_of_16"} == set(metrics["baselines"])
    for stage in ("3_ppo", "3_dpo", "3_sft_preferred", "3_sft_chance"):
        assert {"win_rate", "win_rate_greedy", "kl", "entropy"} < set(stages[stage]), stage
    assert "win_rate" in metrics["baselines"]["best_of_16"] and "kl" not in stages["2_sft"]


@pytest.mark.slow
def test_a_model_with_tools_is_measured_in_dialogues(smoke: Callable[[str], dict[str, Any]]) -> None:
    stages = smoke("pocket-tools")["stages"]
    assert {"2_sft", "4_grpo"} < set(stages)
    for stage in ("2_sft", "4_grpo"):
        assert {"pass@1", "tool_calls", "tool_score"} < set(stages[stage]), stage


@pytest.mark.slow
def test_an_existing_model_goes_through_stages_2_to_4_with_lora(
    tmp_path: Path, smoke: Callable[[str], dict[str, Any]]
) -> None:
    words = tokenizer()
    # Many models of the Hub pad with the end of a turn, and have such a template.
    words.pad_token, words.chat_template = words.eos_token, CHATML
    sizes = ScratchArguments(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=2048)
    base = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    build_model(sizes, words, 0).save_pretrained(base)
    words.save_pretrained(base)
    write_data(tmp_path / "trl-lib/Capybara", [{"messages": pair["chosen"]} for pair in PAIRS])
    write_data(tmp_path / "trl-lib/ultrafeedback_binarized", PAIRS)
    write_data(tmp_path / "trl-lib/ultrafeedback-prompt", [{"prompt": pair["chosen"][:-1]} for pair in PAIRS])
    write_data(tmp_path / "openai/gsm8k", QUESTIONS, "main")

    recipe = shutil.copytree(ROOT / "recipes" / "existing-model", tmp_path / "existing-model")
    # In bfloat16, the base would be saved as it was used in training, with rounded weights.
    with (recipe / "3_ppo.yaml").open("a") as file:
        file.write("frozen_dtype: float32\n")

    metrics = smoke(str(recipe))

    assert set(metrics["stages"]) == {"0_base", "2_sft", "3_reward", "3_ppo", "4_grpo"}
    run = tmp_path / "runs" / "existing-model-smoke"
    assert PeftConfig.from_pretrained(run / "2_sft").base_model_name_or_path == str(base)
    for stage in ("3_reward", "3_ppo", "4_grpo"):
        assert PeftConfig.from_pretrained(run / stage).base_model_name_or_path == str(run / stage / "base")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        sft, last = (AutoPeftModelForCausalLM.from_pretrained(run / stage)(ids).logits for stage in ("2_sft", "3_ppo"))
        start = AutoModelForCausalLM.from_pretrained(run / "3_ppo" / "base")(ids).logits
    torch.testing.assert_close(start, sft, atol=1e-4, rtol=1e-4)
    assert not torch.equal(last, start)
    saved = AutoTokenizer.from_pretrained(run / "4_grpo")
    assert saved.pad_token == "<|pad|>" and saved.chat_template == CHATML
