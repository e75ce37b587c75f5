"""Which steps of a finished run of recipes/pocket run again after a change of its YAML files."""

import json
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import hardware
from pipeline.__main__ import main
from pipeline.config.weight_fields import has_effect
from pipeline.runner import records
from pipeline.runner.due import Decision, decide
from pipeline.runner.plan import read_plan
from pipeline.runner.records import RunRecord

POCKET = Path(__file__).parents[2] / "recipes/pocket"
ORDER = (
    "0_data", "0_tokenizer", "0_random", "1_pretrain", "2_sft", "3_preferences", "3_reward", "3_ppo", "4_grpo",
)  # fmt: skip
AFTER_PRETRAINING = set(ORDER[3:])
REMOVED = "removed"
"""Stands for a field that is removed from the file."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/pocket`, all of whose steps have finished, as far as the runner can see."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(records, "describe_machine", dict)
        plan = read_plan(POCKET)
        record = RunRecord.read(plan.run_dir)
        for step in plan.steps:
            step.product.parent.mkdir(parents=True, exist_ok=True)
            if step.kind == "evaluate":
                step.product.write_text("{}")
            else:
                write_model(step.output, step.values)
            record.start(step, "start", "")
            record.stop(step, 1.0, finished=True)
    return folder


def write_model(output: Path, values: Mapping[str, Any]) -> None:
    total = values.get("max_steps", 100)
    checkpoint = output / f"checkpoint-{total}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": total, "max_steps": total, "num_train_epochs": 1}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name in ("config.json", "model.safetensors", "index.html"):
        (output / name).touch()


@pytest.fixture
def recipe(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of recipes/pocket to change; the current directory holds its finished run."""
    monkeypatch.chdir(finished)
    return Path(shutil.copytree(POCKET, tmp_path / "pocket"))


@pytest.fixture
def own_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the finished run, which a test may change."""
    shutil.copytree("runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)


def change(recipe: Path, name: str, values: Mapping[str, Any]) -> None:
    path = recipe / f"{name}.yaml"
    content = {**yaml.safe_load(path.read_text()), **values}
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not REMOVED}))


def due(recipe: Path) -> dict[str, Decision]:
    """Return the decisions about the steps that would run."""
    plan = read_plan(recipe)
    decisions = decide(plan.steps, RunRecord.read(plan.run_dir))
    return {name: decision for name, decision in decisions.items() if decision.action != "skip"}


def test_nothing_is_due_after_a_whole_run(recipe: Path) -> None:
    assert due(recipe) == {}


@pytest.mark.usefixtures("own_run")
def test_an_evaluation_of_an_earlier_version_had_the_defaults_of_later_keys(recipe: Path) -> None:
    path = Path("runs/pocket/run.json")
    record = json.loads(path.read_text())
    for name, step in record["steps"].items():
        if name.startswith("evaluate"):
            assert step["values"].pop("shots") == 0 and step["values"].pop("best_of") == 0
    path.write_text(json.dumps(record))
    assert due(recipe) == {}


@pytest.mark.usefixtures("own_run")
def test_a_field_that_was_removed_makes_no_step_due(recipe: Path) -> None:
    """The YAML file of an earlier release had `kl_estimator: k1`, which has to be omitted now."""
    path = Path("runs/pocket/run.json")
    record = json.loads(path.read_text())
    record["steps"]["3_ppo"]["values"]["kl_estimator"] = "k1"
    path.write_text(json.dumps(record))
    assert due(recipe) == {}


@pytest.mark.usefixtures("own_run")
def test_a_finished_step_says_that_other_versions_made_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("runs/pocket/run.json")
    record = json.loads(path.read_text())
    for name, version in (("2_sft", "5.0.1"), ("evaluate_2_sft", "5.0.2")):
        record["steps"][name]["versions"] = {"transformers": version}
    # A build for another device is the same version.
    record["recipe"] = str(recipe)
    record["steps"]["3_ppo"]["versions"] = {"torch": f"{metadata.version('torch').partition('+')[0]}+cu130"}
    path.write_text(json.dumps(record))
    plan = read_plan(recipe)
    decisions = decide(plan.steps, RunRecord.read(plan.run_dir))
    made = f"finished; made with transformers 5.0.1 (now {metadata.version('transformers')})"
    assert (decisions["2_sft"].action, decisions["2_sft"].reason) == ("skip", made)
    assert "transformers 5.0.2" in decisions["evaluate_2_sft"].reason
    assert decisions["3_ppo"].reason == "finished"
    assert main(["status", "runs/pocket"]) == 0
    assert made in capsys.readouterr().out


@pytest.mark.usefixtures("own_run")
def test_a_step_runs_again_if_a_file_changes_that_its_reward_imports(recipe: Path, tmp_path: Path) -> None:
    for name, code in {
        "my_rewards.py": "from my_helpers import sign\ndef length(completions, **columns): ...\n",
        "my_helpers/__init__.py": "from .deep import w as sign\n",
        "my_helpers/deep.py": "w = 1\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    change(recipe, "4_grpo", {"reward_funcs": ["my_rewards:length"]})
    run_again(recipe)
    assert due(recipe) == {}
    for name in ("my_rewards.py", "my_helpers/__init__.py", "my_helpers/deep.py"):
        code = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f"{code}# edited\n")
        assert due(recipe)["4_grpo"].reason == f"{name} has changed"
        (tmp_path / name).write_text(code)
    assert due(recipe) == {}


def run_again(recipe: Path) -> None:
    """Record all steps as finished, as far as the runner can see."""
    plan = read_plan(recipe)
    record = RunRecord.read(plan.run_dir)
    for step in plan.steps:
        record.start(step, "start", "")
        record.stop(step, 1.0, finished=True)


@pytest.mark.usefixtures("own_run")
def test_a_trainer_of_the_user_makes_its_stage_due_and_so_does_an_edit_of_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(".")
    Path("my_ppo.py").write_text("raise SystemExit('planning imports nothing')\n")
    change(recipe, "3_ppo", {"trainer": "my_ppo:EntropyPPO"})
    assert due(recipe)["3_ppo"].reason == "its configuration changed (trainer: None -> my_ppo:EntropyPPO)"
    run_again(recipe)
    assert due(recipe) == {}
    Path("my_ppo.py").write_text("raise SystemExit('changed')\n")
    decisions = due(recipe)
    assert decisions["3_ppo"].reason == "my_ppo.py has changed"
    assert {"evaluate_3_ppo", "4_grpo"} <= decisions.keys() and "2_sft" not in decisions


@pytest.mark.usefixtures("own_run")
def test_an_edited_function_of_the_user_is_noticed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward is edited ten times an hour; the run called itself finished."""
    monkeypatch.syspath_prepend(".")
    code = Path("my_rewards.py")
    code.write_text("raise SystemExit('planning imports nothing')\n")
    judge = Path("my_judges/pairwise.py")
    judge.parent.mkdir()
    (judge.parent / "__init__.py").write_text("raise SystemExit('planning imports nothing')\n")
    judge.write_text("")
    change(recipe, "4_grpo", {"reward_funcs": ["math_answer", "my_rewards:short"]})
    (recipe / "evaluate.yaml").write_text("judge: my_judges.pairwise:compare\n")
    run_again(recipe)
    assert due(recipe) == {}
    code.write_text("raise SystemExit('changed')\n")
    decisions = due(recipe)
    assert decisions["4_grpo"].reason == "my_rewards.py has changed"
    assert decisions.keys() == {"4_grpo", "evaluate_4_grpo", "report"}
    run_again(recipe)
    judge.write_text("# changed\n")
    decisions = due(recipe)
    assert decisions["evaluate_2_sft"].reason == "my_judges/pairwise.py has changed"
    assert {name for name in decisions if not name.startswith("evaluate_")} == {"report"}
    # A run of a release that recorded no code stays finished.
    run_again(recipe)
    record = json.loads(Path("runs/pocket/run.json").read_text())
    for step in record["steps"].values():
        step["files"] = {path: digest for path, digest in step["files"].items() if not path.endswith(".py")}
    Path("runs/pocket/run.json").write_text(json.dumps(record))
    assert due(recipe) == {}


def test_the_reason_names_the_keys_that_differ_and_shows_short_values_only(recipe: Path) -> None:
    """Naming two columns of the problems printed a screenful."""
    change(recipe, "4_grpo", {"prompt_column": "question", "max_steps": 7})
    decisions = due(recipe)
    assert "max_steps: 48 -> 7" in decisions["4_grpo"].reason
    keys = "problems.prompt_column, trained_on.problems.prompt_column"
    assert decisions["evaluate_2_sft"].reason == f"its configuration changed ({keys})"
    change(recipe, "evaluate", {"problems": None})
    assert due(recipe)["evaluate_2_sft"].reason.startswith("its configuration changed (problems, ")


@pytest.mark.usefixtures("own_run")
def test_opening_the_page_leaves_a_run_finished_and_the_first_vote_does_not(recipe: Path) -> None:
    votes = Path("runs/pocket/votes/votes.jsonl")
    votes.parent.mkdir()
    votes.touch()
    assert due(recipe) == {}
    votes.write_text("{}\n")
    assert due(recipe)["evaluate_3_reward"].reason == "runs/pocket/votes/votes.jsonl has changed"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("1_pretrain", {"logging_steps": 25}),
        ("1_pretrain", {"save_steps": 110}),
        ("1_pretrain", {"save_total_limit": REMOVED}),
        ("1_pretrain", {"save_strategy": "epoch"}),
        ("1_pretrain", {"eval_steps": 110}),
        ("1_pretrain", {"eval_strategy": "no", "eval_steps": REMOVED}),
        ("1_pretrain", {"max_eval_samples": 100, "per_device_eval_batch_size": 64}),
        ("1_pretrain", {"metric_for_best_model": "loss"}),
        # Both values are the defaults.
        ("1_pretrain", {"adam_beta1": 0.9, "gradient_accumulation_steps": 1}),
        # `max_steps` decides when training ends.
        ("1_pretrain", {"num_train_epochs": 7}),
        ("2_sft", {"report_to": ["tensorboard"], "run_name": "mine"}),
        ("2_sft", {"hub_model_id": "me/mine", "hub_strategy": "end", "hub_private_repo": True}),
        ("2_sft", {"push_to_hub": True}),
        ("2_sft", {"logging_first_step": True, "log_level": "error", "disable_tqdm": True}),
        ("2_sft", {"gradient_checkpointing": True}),
        ("2_sft", {"activation_checkpointing": REMOVED}),
        ("3_reward", {"dataset_num_proc": 4}),
        ("2_sft", {"dataloader_num_workers": 2, "dataloader_pin_memory": True}),
        ("3_reward", {"ddp_timeout": 60}),
        ("3_reward", {"num_train_epochs": 1.0}),
        ("3_ppo", {"log_completions": True, "num_completions_to_print": 3}),
        # The recipe has it as a list of one.
        ("4_grpo", {"reward_funcs": "exact_answer"}),
        ("4_grpo", {"embedding_learning_rate": None, "temperature": 1.0}),
    ],
    ids=str,
)
def test_a_change_without_effect_on_the_weights_runs_nothing(
    recipe: Path, name: str, values: Mapping[str, Any]
) -> None:
    change(recipe, name, values)
    assert due(recipe) == {}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("0_data", {"size_mb": 5}, set(ORDER)),
        ("0_data", {"carelessness": 0.5}, set(ORDER)),
        ("0_tokenizer", {"vocab_size": 2048}, set(ORDER[1:])),
        ("1_pretrain", {"hidden_size": 256}, set(ORDER[2:])),
        ("1_pretrain", {"attention_bias": REMOVED}, set(ORDER[2:])),
        ("1_pretrain", {"seed": 1}, set(ORDER[2:])),
        ("1_pretrain", {"learning_rate": 0.011}, AFTER_PRETRAINING),
        ("1_pretrain", {"max_steps": 600}, AFTER_PRETRAINING),
        ("1_pretrain", {"torch_compile": True}, AFTER_PRETRAINING),
        ("1_pretrain", {"dataset_num_proc": 2}, AFTER_PRETRAINING),
        ("1_pretrain", {"load_best_model_at_end": True}, AFTER_PRETRAINING),
        ("1_pretrain", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, AFTER_PRETRAINING),
        ("1_pretrain", {"dataset_config": "other"}, AFTER_PRETRAINING),
        ("2_sft", {"packing": False}, set(ORDER[4:])),
        ("2_sft", {"dataset_num_proc": 2}, set(ORDER[4:])),
        ("2_sft", {"max_length": 200}, set(ORDER[4:])),
        ("2_sft", {"embedding_learning_rate": None}, set(ORDER[4:])),
        ("2_sft", {"gradient_accumulation_steps": 2}, set(ORDER[4:])),
        ("2_sft", {"use_peft": True}, set(ORDER[4:])),
        ("3_preferences", {"temperature": 0.9}, set(ORDER[5:])),
        ("3_preferences", {"max_eval_prompts": 100}, set(ORDER[5:])),
        ("3_reward", {"num_train_epochs": 0.5}, set(ORDER[6:])),
        ("3_ppo", {"kl_coef": 0.2}, set(ORDER[7:])),
        ("3_ppo", {"reward_weights": [1.0, 0.5]}, set(ORDER[7:])),
        ("4_grpo", {"num_generations": 4}, {"4_grpo"}),
        ("4_grpo", {"max_completion_length": 48}, {"4_grpo"}),
        ("4_grpo", {"reward_funcs": ["math_answer"]}, {"4_grpo"}),
    ],
    ids=lambda value: f"{len(value)} steps" if isinstance(value, set) else str(value),
)
def test_a_change_with_an_effect_runs_its_step_and_those_that_depend_on_it(
    recipe: Path, name: str, values: Mapping[str, Any], expected: set[str]
) -> None:
    change(recipe, name, values)
    found = due(recipe)
    assert {step for step in found if not step.startswith(("evaluate", "report"))} == expected
    assert {decision.action for decision in found.values()} == {"start"}
    measured = {f"evaluate_{step}" for step in expected - {"0_data", "0_tokenizer", "3_preferences"}}
    # A change of `dataset_config` changes the text that every stage is measured on.
    if "dataset_config" not in values:
        assert {"report", *measured} == set(found) - expected
    assert not any(decision.deletes for decision in found.values())


def test_a_field_that_was_not_given_is_compared_with_what_training_recorded(recipe: Path, finished: Path) -> None:
    chosen = hardware.training_defaults()["bf16"].value
    record = finished / "runs/pocket/2_sft/arguments.json"
    record.write_text(json.dumps({"packing_strategy": "wrapped", "bf16": chosen}))
    change(recipe, "2_sft", {"packing_strategy": "wrapped", "bf16": chosen})
    assert due(recipe) == {}
    change(recipe, "2_sft", {"packing_strategy": "bfd"})
    assert "2_sft" in due(recipe)
    change(recipe, "2_sft", {"packing_strategy": REMOVED, "bf16": not chosen})
    assert "2_sft" in due(recipe), "precision has an effect"
    record.unlink()


@pytest.mark.parametrize(
    ("name", "values"), [("1_pretrain", {"max_steps": 1400, "save_steps": 140}), ("3_reward", {"num_train_epochs": 2})]
)
def test_more_steps_go_on_from_the_last_checkpoint(recipe: Path, name: str, values: Mapping[str, Any]) -> None:
    change(recipe, name, values)
    found = due(recipe)
    assert found[name].action == "continue"
    assert all(decision.action == "start" for step, decision in found.items() if step != name)
    assert f"evaluate_{name}" in found
    change(recipe, name, {"learning_rate": 0.5})
    assert due(recipe)[name].action == "start", "another learning rate is not only more steps"


def test_without_a_checkpoint_more_steps_begin_again(recipe: Path, own_run: None) -> None:
    for path in Path("runs/pocket/4_grpo").glob("checkpoint-*"):
        shutil.rmtree(path)
    change(recipe, "4_grpo", {"max_steps": 900})
    assert due(recipe)["4_grpo"].action == "start"


def test_a_step_that_was_continued_by_hand_is_seen_and_can_be_kept(recipe: Path, own_run: None) -> None:
    write_model(Path("runs/pocket/4_grpo"), {"max_steps": 900})
    assert due(recipe)["4_grpo"].reason.startswith("was continued to 900 steps outside of this run")
    assert set(due(recipe)) == {"4_grpo", "evaluate_4_grpo", "report"}
    change(recipe, "4_grpo", {"max_steps": 900})
    assert due(recipe)["4_grpo"].action == "continue"


def test_an_interrupted_step_is_resumed_after_a_change_without_effect(recipe: Path, own_run: None) -> None:
    record = RunRecord.read(Path("runs/pocket"))
    record.stop(next(step for step in read_plan(recipe).steps if step.name == "4_grpo"), 1.0, finished=False)
    change(recipe, "4_grpo", {"logging_steps": 7})
    assert due(recipe)["4_grpo"].action == "resume"
    change(recipe, "4_grpo", {"beta": 0.1})
    assert due(recipe)["4_grpo"].action == "start"


@pytest.mark.parametrize("wrong", ["many", None, [1]])
def test_a_wrong_length_is_left_to_the_check_of_the_step(recipe: Path, wrong: object) -> None:
    change(recipe, "4_grpo", {"max_steps": wrong, "num_train_epochs": wrong})
    assert due(recipe)["4_grpo"].action == "start"


def test_evaluations_have_an_effect_if_they_choose_the_weights() -> None:
    for values in ({"load_best_model_at_end": True}, {"lr_scheduler_type": "reduce_lr_on_plateau"}):
        for name in ("eval_steps", "save_steps", "logging_steps", "max_eval_samples", "metric_for_best_model"):
            assert has_effect(name, values) and not has_effect(name, {})
        assert not has_effect("save_total_limit", values) and not has_effect("report_to", values)
    sft = {"model_name_or_path": "model"}
    assert has_effect("dataloader_num_workers", {"dataset_streaming": True, **sft})
    assert not has_effect("dataloader_num_workers", {"dataset_streaming": True}), "pretraining has a thread of its own"
    assert has_effect("dataset_num_proc", {}) and not has_effect("dataset_num_proc", {"dataset_streaming": True})
