"""The GRPO recipe from the command line: GSM8K's format by YAML alone, several rewards, the control, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.rl.arguments import GRPORewardArguments, load_rl_inputs
from pipeline.training import entry
from tests.helpers import ppo_toy as toy
from tests.helpers.sampling_recipes import run


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Save a policy and a file in the format of GSM8K, and return the options that name them."""
    toy.policy().save_pretrained(tmp_path / "policy")
    toy.tokenizer().save_pretrained(tmp_path / "policy")
    with open(tmp_path / "gsm8k.jsonl", "w") as file:
        for i in range(16):
            answer = f"{i} plus 1,000 is <<{i}+1000={i + 1000}>>{i + 1000:,}.\n#### {i + 1000:,}"
            file.write(json.dumps({"question": "red green", "answer": answer}) + "\n")
    fields: dict[str, Any] = {
        "output_dir": tmp_path / "run",
        "model_name_or_path": tmp_path / "policy",
        "dataset_name": tmp_path / "gsm8k.jsonl",
        "prompt_column": "question",
        "answer_pattern": r"####\s*(.+)",
        "reward_funcs": ["math_answer", "tests.helpers.ppo_toy:share_of_red"],
        "reward_weights": [1.0, 0.5],
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_steps": 2,
        "max_completion_length": 6,
        "logging_steps": 1,
        "report_to": "none",
    }
    config = tmp_path / "grpo.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value, default=str)}\n" for name, value in fields.items()))
    return ["--config", str(config)]


def log_of(output: Path) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [step for step in log if "reward" in step]


def test_gsm8k_by_yaml_alone(tmp_path: Path, options: list[str]) -> None:
    done = run("recipes.grpo", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    log = log_of(tmp_path / "run")
    assert len(log) == 2
    for step in log:
        assert step["math_answer/unparseable_references"] == 0.0
        assert 0.0 <= step["math_answer/unparseable"] <= 1.0
        parts = step["rewards/math_answer/mean"], step["rewards/share_of_red/mean"]
        assert step["reward"] == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-5)


def test_lora_and_the_control_experiment(tmp_path: Path, options: list[str]) -> None:
    lora = [
        "--use_peft",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--shuffle_answers",
        "--max_steps",
        "1",
    ]
    done = run("recipes.grpo", *options, *lora)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert log_of(tmp_path / "run")[0]["math_answer/unparseable_references"] == 0.0


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        (["--reward_funcs", "math_anwser", "--dataset_train_split", "trian"], ["math_answer?", "trian"]),
        (["--reward_funcs", "code_tests", "--reward_weights", "1"], ["code_tests", "no column test"]),
        (["--reward_weights", "1"], ["one weight for each of the 2"]),
        (["--num_generations", "3"], ["num_generations"]),
        (["--answer_pattern", "=> (.*)"], ["answer_pattern", "row 0"]),
        (["--answer_pattern", "("], ["answer_pattern"]),
        (["--shuffle_answers", "--dataset_streaming"], ["shuffle_answers"]),
        (["--max_completion_length", "100"], ["max_completion_length"]),
        (["--lr_scheduler_type", "cosine_with_min_lr", "--reward_funcs", "os:getcwd"], ["min_lr", "**columns"]),
        (["--reward_funcs", "hidden_taste", "--optim_args", "a", "--reward_weights", "1"], ["weight 0", "optim_args"]),
    ],
)  # fmt: skip
def test_refuses_arguments_that_do_not_fit_together(
    options: list[str], changes: list[str], reported: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(
        data_args: DataArguments, reward_args: GRPORewardArguments, training_args: GRPOConfig, model_args: ModelConfig
    ) -> None:
        load_rl_inputs(data_args, reward_args, training_args, model_args)

    with pytest.raises(SystemExit, match="2"):
        entry.run(main, [*options, *changes])
    message = capsys.readouterr().err
    assert all(word in message for word in reported), message


def test_refuses_before_it_writes(tmp_path: Path, options: list[str]) -> None:
    refused = run("recipes.grpo", *options, "--reward_funcs", "math_anwser", "--reward_weights", "1")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "math_answer?" in refused.stderr and not (tmp_path / "run").exists()
