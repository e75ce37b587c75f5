"""What a late stage would refuse is reported before the first one runs, also where `--smoke` would hide it."""

from pathlib import Path

import pytest
import yaml

from pipeline.data import splits
from pipeline.runner.plan import read_plan
from pipeline.runner.preflight import check_steps
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused
from tests.helpers.small_model import ROOT

LATE = {
    "1_pretrain": {"block_size": 4096},
    "2_sft": {"max_length": 2560, "chat_template_path": "nope.jinja", "trainer": "trl:SFTTrainer"},
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
    "2_sft: trainer: trl:SFTTrainer: must be a subclass of pipeline.training.fine_tuning.SFTTrainer",
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
    lines = refused(capsys, "run", "mine", how).splitlines()
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


def refused_data(**data: dict[str, object]) -> list[str]:
    """Return what is refused of a recipe whose steps read these data, each problem as one line."""
    steps = read_plan(write_recipe(**data)).steps
    return [str(problem) for problem in check_steps(steps)]


def test_wrong_questions_pairs_and_texts_are_one_list_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were refused one after the other, some after a tokenizer had been trained."""
    monkeypatch.chdir(tmp_path)
    texts = write_rows("texts.jsonl", [{"body": "A sentence."}])
    questions = write_rows("questions.jsonl", [{"frage": "1 + 1?", "antwort": "2"}] * 30)
    Path("pairs.csv").write_text("query,positive,negative\nWhat?,This,That\n")
    talks = [{"messages": [{"speaker": "user", "utterance": "Hi"}]}] * 3
    write_recipe(
        **{
            "0_tokenizer": {"dataset_name": texts, "dataset_config": None},
            "1_pretrain": {"dataset_name": texts, "dataset_config": None},
            "2_sft": {"dataset_name": write_rows("talks.jsonl", talks), "dataset_config": None},
            "3_reward": {"dataset_name": "pairs.csv", "dataset_config": None},
            "4_grpo": {"dataset_name": questions, "dataset_config": None},
            "evaluate": {"text": {"dataset_name": write_rows("test.jsonl", [{"story": "A sentence."}])}},
        }
    )
    lines = refused(capsys, "run", "mine").splitlines()
    assert [line.partition(": there is")[0] for line in lines if "there is no such column" in line] == [
        "1_pretrain: text_column: text",
        "3_reward: chosen_column: chosen",
        "3_reward: rejected_column: rejected",
        "4_grpo: prompt_column: prompt",
        "evaluate.yaml: text: text_column: text",
    ]
    (talk,) = [line for line in lines if "there is no such column" not in line]
    assert talk.startswith("2_sft: dataset_name: talks.jsonl, split train, row 0: ")
    assert "the first 3 rows are all like this" in talk
    assert not Path("runs").exists()


def test_right_data_and_data_that_a_step_drops_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/day.md").write_text("It rained.")
    bad = [{"question": "1 + 1?", "answer": "2"}, {"question": None, "answer": "2"}]
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    none: dict[str, object] = {"dataset_config": None}
    refused = refused_data(
        **{
            "1_pretrain": {"dataset_name": "notes", **none},
            "2_sft": {"dataset_name": write_rows("bad.jsonl", bad), "drop_bad_rows": True, **none},
            "3_reward": {"dataset_name": write_rows("pairs.jsonl", [pair, pair]), **none},
            "4_grpo": {"dataset_name": "openai/gsm8k", "prompt_column": "question", **none},
            "evaluate": {"problems": {"dataset_name": write_rows("test.jsonl", bad[:1]), "grade": "math"}},
        }
    )
    assert refused == []


def test_large_files_are_read_as_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "SMALL_BYTES", 10)
    questions = write_rows(
        "questions.jsonl", [*[{"question": "1 + 1?", "answer": "2"}] * 3, {"question": 7, "answer": "2"}]
    )
    (refused,) = refused_data(**{"2_sft": {"dataset_name": questions, "dataset_config": None}})
    assert refused.startswith("2_sft: dataset_name: questions.jsonl, split train, row 3: ")
