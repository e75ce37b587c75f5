"""What a late stage would refuse is reported before the first one runs, also where `--smoke` would hide it."""

from pathlib import Path

import pytest
import yaml
from small_model import ROOT

from pipeline.__main__ import main
from pipeline.runner.preflight import check_steps
from pipeline.runner.recipe import read_plan

LATE = {
    "1_pretrain": {"block_size": 4096},
    "2_sft": {"max_length": 2560, "chat_template_path": "nope.jinja"},
    "3_preferences": {"max_new_tokens": 5120, "tools": ["calculater"]},
    "3_ppo": {"reward_model_path": "./other/3_reward", "use_peft": True, "lora_target_modules": ["q_prj"]},
    "4_grpo": {
        "num_generations": 7,
        "attn_implementation": "flash_atention",
        "reward_funcs": ["exact_answer", "math_answer"],
        "reward_weights": [1.0],
    },
    "evaluate": {"max_new_tokens": 640},
}
"""Settings of pocket that its stages refuse, which begin after minutes there, and after hours elsewhere."""

REFUSED = [
    "1_pretrain: block_size: 4096: the model's context is 512 tokens",
    "2_sft: chat_template_path: nope.jinja: there is no such file",
    "2_sft: max_length: 2560: the model's context is 512 tokens",
    "3_preferences: tools: calculater: did you mean calculator?",
    "3_preferences: max_new_tokens: 5120: the model's context is 512 tokens",
    "3_ppo: reward_model_path: ./other/3_reward: there is no such file",
    "3_ppo: lora_target_modules: q_prj: ",
    "4_grpo: num_generations: 7: generation_batch_size (128) must be divisible by num_generations (7)",
    "4_grpo: reward_weights: 1: give one weight for each of the 2 rewards",
    "4_grpo: attn_implementation: flash_atention: ",
    "evaluate.yaml: max_new_tokens: 640: the model's context is 512 tokens",
]


def write_recipe(**changes: dict[str, object]) -> Path:
    """Write pocket's recipe with other settings to the folder `mine`."""
    folder = Path("mine")
    folder.mkdir()
    for path in (ROOT / "recipes" / "pocket").glob("*.yaml"):
        values = yaml.safe_load(path.read_text()) | changes.get(path.stem, {})
        (folder / path.name).write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.parametrize("how", ["--dry-run", "--smoke"])
def test_all_that_later_stages_refuse_is_one_list_before_anything_is_written(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe(**LATE)
    with pytest.raises(SystemExit) as ended:
        main(["run", "mine", how])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(REFUSED), lines
    assert [line for line, start in zip(lines, REFUSED, strict=True) if not line.startswith(start)] == []
    assert not Path("runs").exists()


def test_batches_are_divided_by_the_processes_that_will_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    half = {"per_device_train_batch_size": 4, "num_generations": 8}
    one = {"per_device_train_batch_size": 1, "steps_per_generation": 1}
    steps = read_plan(write_recipe(**{"4_grpo": half, "3_ppo": one})).steps
    assert sorted(problem.field for problem in check_steps(steps)) == [
        "3_ppo: per_device_train_batch_size",
        "4_grpo: num_generations",
    ]
    assert check_steps(steps, processes=2) == []
    assert check_steps(steps, due=["2_sft"]) == [], "what has finished is not checked"
