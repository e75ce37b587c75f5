"""Recipes that come with the package: found by name from anywhere, and copied to a folder to change."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.config.recipe_folder import find_shipped
from pipeline.runner.copy_recipe import shipped_recipes
from pipeline.runner.plan import read_plan
from tests.helpers.refusals import refused


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder is the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["pocket", "recipes/pocket"])
def test_a_shipped_recipe_and_its_launch_file_are_found_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", name, "--dry-run", "--until", "1_pretrain"]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    named = [word for command in commands for word in command if word.endswith(".yaml")]
    assert named and all(Path(word).is_file() for word in named)
    assert read_plan(Path(name)).run_dir == Path("runs/pocket"), "below the current directory"


def test_a_folder_of_the_same_name_comes_first() -> None:
    Path("pocket").mkdir()
    Path("pocket/0_tokenizer.yaml").write_text("output_dir: runs/mine/tokenizer")
    assert [step.name for step in read_plan(Path("pocket")).steps] == ["0_tokenizer", "report"]


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_a_copy_is_the_same_recipe_in_a_run_of_its_own(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", recipe, "my/own"]) == 0
    assert "fourstage run my/own" in capsys.readouterr().out
    original, copy = read_plan(Path(recipe)), read_plan(Path("my/own"))
    assert copy.run_dir == Path("runs/own")
    assert [step.name for step in copy.steps] == [step.name for step in original.steps]
    for one, other in zip(original.steps, copy.steps, strict=True):
        values = str(one.values).replace(f"recipes/{recipe}/", "my/own/")
        assert re.sub(rf"{original.run_dir}\b", "runs/own", values) == str(other.values)
    for path in [*Path("my/own").glob("*.yaml"), Path("my/own/README.md")]:
        text = path.read_text()
        # `full` and `dpo` are recipes by themselves.
        assert not re.search(rf"\b({original.run_dir}|recipes/{recipe})(?![\w-]|/full|/dpo)", text)
        for name in re.findall(r"(?:--config|--config_file) ([\w./-]+)", text):
            assert name == "recipes/accelerate/fsdp2.yaml" or find_shipped(Path(name)).is_file(), f"{path}: {name}"


def test_a_copy_is_launched_with_its_own_launch_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(["copy", "pocket", "mine"])
    assert main(["run", "mine", "--dry-run"]) == 0
    assert "accelerate launch --config_file mine/accelerate_config.yaml -m" in capsys.readouterr().out


def test_help_has_a_word_on_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["copy", "--help"])
    shown = capsys.readouterr().out
    for recipe in shipped_recipes():
        assert re.search(rf"^  {recipe} +\w.{{20}}", shown, re.MULTILINE), recipe


def test_copying_over_files_or_what_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    first, second = refused(capsys, "copy", "pockets", "full").splitlines()
    assert first.startswith("RECIPE: pockets: is not a recipe of the package; choose from: ") and "pocket" in first
    assert second == "FOLDER: full: is not empty; name a new directory"
    assert [path.name for path in Path("full").iterdir()] == ["file"]
