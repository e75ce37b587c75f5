"""Every YAML file of a recipe folder is one that its recipe accepts, and together they make a run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from small_model import ROOT

from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.data.pocket.build import PocketArguments
from pipeline.models.tokenizer import TokenizerArguments
from pipeline.preferences.collect import PreferenceArguments
from pipeline.runner.plan import read_plan
from pipeline.runner.smoke import smoke_overrides
from pipeline.runner.steps import KINDS
from recipes import grpo, ppo, pretrain, reward, sft

FOLDER = ROOT / "recipes" / "pocket"
FILES = sorted(FOLDER.glob("*.yaml"))
RECIPES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "grpo": grpo}


def kind_of(path: Path) -> str:
    return path.stem.split("_")[1]


def dataclasses_of(kind: str) -> list[type]:
    """The dataclasses that a kind of step parses its file into: those of its `main`."""
    own: dict[str, list[type]] = {
        "data": [PocketArguments],
        "tokenizer": [TokenizerArguments, DataArguments],
        "preferences": [PreferenceArguments],
    }
    if kind in own:
        return own[kind]
    hints = get_type_hints(RECIPES[kind].main)
    return [hint for name, hint in hints.items() if name != "return"]


def parsed(path: Path, *argv: str) -> dict[str, Any]:
    built = parse(*dataclasses_of(kind_of(path)), argv=["--config", str(path), *argv])
    return {name: value for item in built for name, value in vars(item).items()}


def test_the_folder_holds_a_file_for_every_stage() -> None:
    assert {kind_of(path) for path in FILES} == set(KINDS) - {"random"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_accepted_and_its_values_arrive(path: Path, tmp_path: Path) -> None:
    values = parsed(path, "--output_dir", str(tmp_path / "output"))
    written = yaml.safe_load(path.read_text())
    assert written.pop("output_dir").startswith("runs/pocket/")
    for name in written:
        if name not in ("report_to", "lr_scheduler_kwargs"):  # which transformers turns into other objects
            assert values[name] in (written[name], [written[name]]), name  # one item is a list of one


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_smoke_makes_of_a_file_is_accepted(path: Path, tmp_path: Path) -> None:
    overrides = smoke_overrides(kind_of(path), yaml.safe_load(path.read_text()))
    flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    values = parsed(path, "--output_dir", str(tmp_path / "output"), *flags)
    assert "max_steps" not in overrides or values["max_steps"] == 2
    for name, value in overrides.items():
        if name != "report_to":
            assert values[name] == value, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_in_a_file_is_the_one_that_the_runner_prints(path: Path) -> None:
    comments = re.findall(r"^# (python -m .*|accelerate launch .*)$", path.read_text(), re.MULTILINE)
    assert len(comments) == 1
    step = next(step for step in read_plan(FOLDER).steps if step.name == path.stem)
    command = [text.replace(str(ROOT) + "/", "") for text in step.command(["--config_file", "accelerate_config.yaml"])]
    assert shlex.split(comments[0]) == command


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_seed_for_the_whole_run_is_accepted_by_every_step(path: Path, tmp_path: Path) -> None:
    step = next(step for step in read_plan(FOLDER, tmp_path / "run", seed=7).steps if step.name == path.stem)
    _, _, *overrides = step.arguments  # --config FILE
    values = parsed(path, *overrides)
    assert values.get("seed", 7) == 7


def test_every_stage_needs_what_the_design_says() -> None:
    needs = {step.name: set(step.needs) for step in read_plan(FOLDER).steps}
    assert needs["0_tokenizer"] == {"0_data"}
    assert needs["0_random"] == needs["1_pretrain"] == {"0_data", "0_tokenizer"}
    assert needs["2_sft"] == {"0_data", "1_pretrain"}
    assert needs["3_preferences"] == {"0_data", "2_sft"}
    assert needs["3_reward"] == {"3_preferences", "2_sft"}
    assert needs["3_ppo"] == {"0_data", "2_sft", "3_reward"}
    assert needs["4_grpo"] == {"0_data", "3_ppo"}


def test_no_recipe_module_is_long() -> None:
    for module in RECIPES.values():
        assert module.__file__ is not None
        assert len(Path(module.__file__).read_text().splitlines()) <= 90


def test_blocks_fit_the_positions_that_the_model_knows() -> None:
    written = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
    positions = written["1_pretrain"]["max_position_embeddings"]
    assert written["1_pretrain"]["block_size"] <= positions
    assert written["2_sft"]["max_length"] <= positions
    assert written["3_reward"]["max_length"] <= positions
