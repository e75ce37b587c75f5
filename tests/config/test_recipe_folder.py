"""A step that is started by hand before those that it needs names the command to run first."""

from functools import partial
from pathlib import Path

import pytest

from pipeline.config.recipe_folder import missing_input
from pipeline.training.entry import run
from recipes import grpo, sft
from tests.helpers.refusals import refused


def test_one_line_names_the_command_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "does not exist yet; first run `fourstage run recipes/pocket --until"
    # The file comes with the package, not from the current directory.
    config = ("--config", "recipes/pocket/2_sft.yaml")
    assert (
        refused(capsys, *config, main=partial(run, sft.main))
        == f"model_name_or_path: runs/pocket/1_pretrain: {command} 1_pretrain`\n"
    )
    Path("runs/pocket/1_pretrain").mkdir(parents=True)
    assert (
        refused(capsys, *config, main=partial(run, sft.main)) == f"dataset_name: runs/pocket/data: {command} 0_data`\n"
    )
    config = ("--config", "recipes/pocket/4_grpo.yaml")
    assert (
        refused(capsys, *config, main=partial(run, grpo.main))
        == f"model_name_or_path: runs/pocket/3_ppo: {command} 3_ppo`\n"
    )
    assert sorted(path.name for path in Path("runs/pocket").iterdir()) == ["1_pretrain"]


def test_no_command_is_named_for_a_path_that_no_step_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path on the command line is a mistake of the user, which running another step would not correct."""
    monkeypatch.chdir(tmp_path)
    Path("runs/pocket/data").mkdir(parents=True)
    options = ["--config", "recipes/pocket/2_sft.yaml", "--model_name_or_path", "./elsewhere"]
    error = refused(capsys, *options, main=partial(run, sft.main))
    assert "first run" not in error and "elsewhere" in error


def test_of_several_missing_inputs_the_one_with_the_highest_number_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --until 10_reward` runs `9_preferences` as well."""
    monkeypatch.chdir(tmp_path)
    for step in ("9_preferences", "10_reward"):
        Path(f"{step}.yaml").write_text(f"output_dir: runs/mine/{step}\n")
    settings = {"dataset_name": "runs/mine/9_preferences", "reward_model_path": "runs/mine/10_reward"}
    problem = missing_input(settings, "11_ppo.yaml")
    assert problem is not None and problem.field == "reward_model_path"
    assert problem.remedy.endswith("--until 10_reward`")
