"""The evaluations that the runner plans: what they are measured on, what they need, and when they are due."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from pipeline.__main__ import main
from pipeline.errors import UserError
from pipeline.evaluation.checks import check
from pipeline.evaluation.evaluate_yaml import from_record
from pipeline.runner.due import Decision, find_changes
from pipeline.runner.plan import read_plan
from pipeline.runner.run_state import RunState
from pipeline.runner.steps import Step
from tests.helpers.refusals import refused
from tests.helpers.small_model import ROOT

FILES: dict[str, dict[str, Any]] = {
    "2_sft": {"dataset_name": "talk.jsonl", "model_name_or_path": "org/base", "max_length": 128},
    "3_reward": {"dataset_name": "pairs.jsonl", "model_name_or_path": "runs/r/2_sft"},
    "3_reward_judge": {"dataset_name": "others.jsonl", "model_name_or_path": "runs/r/2_sft"},
    "3_ppo": {
        "dataset_name": "talk.jsonl",
        "model_name_or_path": "runs/r/2_sft",
        "reward_model_path": "runs/r/3_reward",
        "max_completion_length": 32,
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("recipe")
    folder.mkdir()
    for name, values in FILES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output_dir": f"runs/r/{name}"}))
    row = {"prompt": "What is 1?", "completion": "One.", "chosen": "One.", "rejected": "Two.", "answer": "1"}
    for name in ("talk", "pairs", "others", "problems"):
        Path(f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    return folder


def evaluations(folder: Path, **options: Any) -> dict[str, Step]:
    return {step.name: step for step in read_plan(folder, **options).steps if step.kind == "evaluate"}


def write_settings(folder: Path, **content: Any) -> None:
    (folder / "evaluate.yaml").write_text(yaml.safe_dump(content))


def test_the_model_that_the_first_stage_starts_from_is_measured_before_it(folder: Path) -> None:
    names = [step.name for step in read_plan(folder).steps]
    assert names[:3] == ["evaluate_0_base", "2_sft", "evaluate_2_sft"]
    base = evaluations(folder)["evaluate_0_base"]
    assert base.arguments == ("evaluate", "runs/r", "--stage", "0_base")
    assert base.values["base"] == "org/base" and base.needs == ()
    assert names.count("evaluate_0_base") == 1


def test_code_of_evaluations_is_as_unconfined_as_a_stage_allows(folder: Path) -> None:
    values = {"dataset_name": "talk.jsonl", "model_name_or_path": "runs/r/3_ppo", "tools": ["python"]}
    values |= {"allow_unconfined_code": True, "output_dir": "runs/r/4_grpo"}
    (folder / "4_grpo.yaml").write_text(yaml.safe_dump(values))
    assert all(step.arguments[-1] == "--allow_unconfined_code" for step in evaluations(folder).values())


def test_every_stage_is_measured_on_the_data_of_all(folder: Path) -> None:
    steps = evaluations(folder)
    assert len({str(step.values) for step in steps.values()}) == 1
    values = steps["evaluate_0_base"].values
    assert values["instructions"]["dataset_name"] == values["prompts"]["dataset_name"] == "talk.jsonl"
    assert values["pairs"]["dataset_name"] == "pairs.jsonl" and values["against"] == "2_sft"
    assert values["lengths"] == {"instructions": 128, "prompts": 32}
    assert set(steps["evaluate_3_ppo"].files) == {Path("talk.jsonl"), Path("pairs.jsonl")}


def test_a_file_of_settings_is_part_of_the_recipe(folder: Path) -> None:
    write_settings(folder, problems="problems.jsonl", judge="runs/r/3_reward_judge", limit=5, max_new_tokens=9)
    steps = evaluations(folder, smoke=True)
    assert steps["evaluate_3_ppo"].values["limit"] == 5, "a smoke run keeps what is smaller than its own"
    assert Path("problems.jsonl") in steps["evaluate_2_sft"].files
    assert "3_reward_judge" in steps["evaluate_3_ppo"].needs
    assert "3_reward_judge" in steps["evaluate_2_sft"].needs, "whose baseline it judges"
    assert steps["evaluate_3_ppo"].values["judge"] == "runs/r/3_reward_judge", "wherever the run is written"
    assert "--max_new_tokens" not in steps["evaluate_3_ppo"].arguments


def test_answers_to_problems_of_ones_own_do_not_begin_as_generated_solutions_do(folder: Path) -> None:
    write_settings(folder, problems="problems.jsonl")
    assert evaluations(folder)["evaluate_2_sft"].values["elicit"] is None
    write_settings(folder, problems="problems.jsonl", elicit="Alors")
    assert evaluations(folder)["evaluate_2_sft"].values["elicit"] == "Alors"
    pocket = evaluations(ROOT / "recipes" / "pocket", output_dir=folder.absolute() / "run")
    assert pocket["evaluate_2_sft"].values["elicit"] == "Working:"


def test_the_stage_that_others_are_compared_with_is_measured_after_its_judge(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(folder, judge="runs/r/3_reward_judge")
    names = [step.name for step in read_plan(folder).steps]
    assert names[1:6] == ["2_sft", "3_reward", "evaluate_3_reward", "3_reward_judge", "evaluate_2_sft"]
    LlamaConfig(num_hidden_layers=1).save_pretrained("base")
    (folder / "2_sft.yaml").write_text("{dataset_name: talk.jsonl, model_name_or_path: base, output_dir: runs/r/2_sft}")
    main(["run", "recipe", "--dry-run", "--until", "sft"])
    assert "3 of 3 steps would run" in capsys.readouterr().out, "not the judge as well"
    main(["run", "recipe", "--dry-run", "--until", "report"])
    assert "10 of 10 steps would run" in capsys.readouterr().out
    write_settings(folder, judge="runs/r/3_reward_judge", against="0_base")
    assert [step.name for step in read_plan(folder).steps][4:6] == ["3_reward_judge", "evaluate_0_base"]


def test_a_slash_at_the_end_of_a_path_changes_nothing(folder: Path) -> None:
    before = read_plan(folder).steps
    for name, values in FILES.items():
        slashed = {key: f"./{value}/" for key, value in values.items() if str(value).startswith("runs/")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**values, **slashed, "output_dir": f"./runs/r/{name}/"}))
    assert read_plan(folder).steps == before


def test_the_model_that_the_first_stage_starts_from_has_a_figure(folder: Path) -> None:
    plan = read_plan(folder)
    Path("runs/r/evaluations").mkdir(parents=True)
    Path("runs/r/evaluations/0_base.json").write_text('{"metrics": {"bits_per_byte": {"value": 1.5}}}')
    done = Decision("skip", "has finished", "")
    todo = [(step, done) for step in plan.steps if step.kind != "report"]
    figures = {stage.name: stage.metric for stage in RunState(plan.run_dir, plan.steps, todo, {}).stages.values()}
    assert list(figures) == ["0_base", "2_sft", "3_reward", "3_reward_judge", "3_ppo"]
    assert figures.pop("0_base") == "bits per byte 1.500" and not any(figures.values())


def test_mistakes_in_it_are_refused_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_settings(folder, judge="runs/r/3_reward", limt=5, problems={"dataset_name": "nowhere/a.jsonl"})
    error = refused(capsys, "run", "recipe", "--dry-run")
    for wrong in ("judge: runs/r/3_reward", "limt: 5", "problems: dataset_name: nowhere/a.jsonl"):
        assert f"evaluate.yaml: {wrong}" in error
    assert not Path("runs").exists()
    (folder / "evaluate.yaml").write_text("limit: [")
    assert "evaluate.yaml, line" in refused(capsys, "run", "recipe", "--dry-run")


def test_what_no_step_makes_is_refused(folder: Path) -> None:
    write_settings(folder, judge="runs/r/3_jugde", against="2_stf", text={"dataset_name": "runs/r/data"})
    with pytest.raises(UserError) as caught:
        read_plan(folder)
    assert [str(problem).partition(": n")[0] for problem in caught.value.problems] == [
        "evaluate.yaml: judge: runs/r/3_jugde",
        "evaluate.yaml: text: runs/r/data",
        "evaluate.yaml: against: 2_stf",
    ]
    write_settings(folder, against="0_base")
    assert evaluations(folder)["evaluate_2_sft"].values["against"] == "0_base"


def test_prompts_that_nobody_can_judge_are_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("talk.jsonl").write_text('{"prompt": "Ça va ?"}\n' * 3)
    values = {"dataset_name": "talk.jsonl", "model_name_or_path": "runs/r/2_sft", "output_dir": "runs/r/3_preferences"}
    (folder / "3_preferences.yaml").write_text(yaml.safe_dump(values))
    message = refused(capsys, "run", "recipe", "--dry-run")
    assert "3_preferences: judge: nothing, for talk.jsonl: its prompts lack" in message
    (folder / "3_preferences.yaml").write_text(yaml.safe_dump({**values, "judge": "tests.helpers.own_functions:x"}))
    assert "3_preferences: judge: tests.helpers.own_functions:x: " in refused(capsys, "run", "recipe", "--dry-run")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("evaluate.yaml")), ids=lambda path: path.parent.name)
def test_the_settings_of_a_recipe_are_accepted(path: Path, tmp_path: Path) -> None:
    steps = evaluations(path.parent, output_dir=tmp_path / "run")
    assert steps and check(*from_record(next(iter(steps.values())).values)) == []


def test_other_arguments_of_the_chat_template_are_measured_again(folder: Path) -> None:
    steps = evaluations(folder)
    # A release may add a key.
    older = {name: value for name, value in steps["evaluate_2_sft"].values.items() if name != "chat_template_kwargs"}
    assert not find_changes(steps["evaluate_2_sft"], older)[0]
    values = {**FILES["3_ppo"], "output_dir": "runs/r/3_ppo", "chat_template_kwargs": {"enable_thinking": False}}
    (folder / "3_ppo.yaml").write_text(yaml.safe_dump(values))
    for name, step in evaluations(folder).items():
        assert list(find_changes(step, steps[name].values)[0]) == ["chat_template_kwargs"]
