"""Each YAML file of the recipe folders is accepted by its recipe, and those of a folder make a run."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from pipeline.runner.plan import read_plan
from pipeline.runner.steps import smoke_overrides
from pipeline.stages import STAGES
from tests.helpers.small_model import ROOT

RECIPES = ROOT / "recipes"
FOLDER = RECIPES / "pocket"
FILES = sorted(RECIPES.rglob("[0-9]_*.yaml"))


def kind_of(path: Path) -> str:
    return path.stem.split("_")[1]


def parsed(path: Path, *argv: str) -> dict[str, Any]:
    recipe = import_module(STAGES[kind_of(path)].module)
    built = parse(*argument_types(recipe.main), argv=["--config", str(path), *argv])
    return {name: value for item in built for name, value in vars(item).items()}


def name_of(path: Path) -> str:
    """Return the name of a file for the list of tests."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def test_the_folder_contains_a_file_for_every_stage_of_the_path() -> None:
    """Kinds whose box is in the picture of the path, and what they start from; other kinds are variants of these."""
    kinds = {kind_of(path) for path in FILES if path.parent == FOLDER}
    boxes = {name for name, kind in STAGES.items() if kind.box and not kind.file_of}
    assert kinds == boxes | {"data", "tokenizer", "preferences", "reward"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_accepted_and_its_values_arrive(path: Path, tmp_path: Path) -> None:
    values = parsed(path, "--output_dir", str(tmp_path / "output"))
    written = yaml.safe_load(path.read_text())
    assert written.pop("output_dir").startswith(f"runs/{'-'.join(path.relative_to(RECIPES).parent.parts)}/")
    for name in written:
        # transformers turns these two into other objects.
        if name not in ("report_to", "lr_scheduler_kwargs"):
            # A single item becomes a list of one.
            assert values[name] in (written[name], [written[name]]), name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_smoke_version_of_a_file_is_accepted(path: Path, tmp_path: Path) -> None:
    overrides = smoke_overrides(kind_of(path), yaml.safe_load(path.read_text()))
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    values = parsed(path, "--output_dir", str(tmp_path / "output"), *flags)
    assert "max_steps" not in overrides or values["max_steps"] == 2
    for name, value in overrides.items():
        if name != "report_to":
            assert values[name] == value, name


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_command_in_a_file_is_the_one_that_the_runner_prints(path: Path) -> None:
    comments = re.findall(r"^# (python -m .*|accelerate launch .*)$", path.read_text(), re.MULTILINE)
    assert len(comments) == 1
    step = next(step for step in read_plan(path.parent).steps if step.name == path.stem)
    command = [text.replace(str(ROOT) + "/", "") for text in step.command(["--config_file", "accelerate_config.yaml"])]
    assert shlex.split(comments[0]) == command


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_seed_for_the_whole_run_is_accepted_by_every_step(path: Path, tmp_path: Path) -> None:
    step = next(step for step in read_plan(path.parent, tmp_path / "run", seed=7).steps if step.name == path.stem)
    # The first two arguments are `--config FILE`.
    _, _, *overrides = step.arguments
    values = parsed(path, *overrides)
    assert values.get("seed", 7) == 7


def test_every_stage_depends_on_the_right_ones() -> None:
    needs = {step.name: set(step.needs) for step in read_plan(FOLDER).steps}
    assert needs["0_tokenizer"] == {"0_data"}
    assert needs["0_random"] == {"0_tokenizer"}
    assert needs["1_pretrain"] == {"0_data", "0_tokenizer"}
    assert needs["2_sft"] == {"0_data", "1_pretrain"}
    assert needs["3_preferences"] == {"0_data", "2_sft"}
    assert needs["3_reward"] == {"3_preferences", "2_sft"}
    assert needs["3_ppo"] == {"0_data", "2_sft", "3_reward"}
    assert needs["4_grpo"] == {"0_data", "3_ppo"}


def test_an_existing_model_goes_from_stage_to_stage() -> None:
    """With adapters, with all weights, and by DPO instead of PPO."""
    for folder in ("existing-model", "existing-model/full"):
        needs = {step.name: set(step.needs) for step in read_plan(RECIPES / folder).steps}
        assert needs["2_sft"] == set(), folder
        assert needs["3_reward"] == {"2_sft"} and needs["3_ppo"] == {"2_sft", "3_reward"}, folder
        assert needs["4_grpo"] == {"3_ppo"}, folder
    needs = {step.name: set(step.needs) for step in read_plan(RECIPES / "existing-model" / "dpo").steps}
    assert needs["3_dpo"] == {"2_sft"} and needs["4_grpo"] == {"3_dpo"}


def test_the_starting_model_is_measured_with_the_tokenizer_of_the_first_stage() -> None:
    steps = {step.name: step for step in read_plan(RECIPES / "existing-model" / "full").steps}
    settings, first = steps["evaluate_0_base"].values, steps["2_sft"].values
    assert settings["base"] == first["model_name_or_path"]
    assert settings["base_tokenizer"] == first["tokenizer_name_or_path"]


@pytest.mark.parametrize("folder", ["pocket", "gsm8k-shakespeare"])
def test_blocks_fit_the_positions_that_the_model_knows(folder: str) -> None:
    written = {path.stem: yaml.safe_load(path.read_text()) for path in FILES if path.parent.name == folder}
    positions = written["1_pretrain"]["max_position_embeddings"]
    assert written["1_pretrain"]["block_size"] <= positions
    assert written["2_sft"]["max_length"] <= positions
    assert written["3_reward"]["max_length"] <= positions
