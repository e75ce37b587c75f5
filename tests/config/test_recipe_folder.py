"""A step that is started by hand before those that it needs names the command to run first."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.training.entry import run
from recipes import grpo, sft


def refusal(capsys: pytest.CaptureFixture[str], main: object, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(main, argv)  # type: ignore[arg-type]
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_one_line_names_the_command_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "does not exist yet; first run `python -m pipeline run recipes/pocket --until"
    config = ("--config", "recipes/pocket/2_sft.yaml")  # as it comes with the package
    assert refusal(capsys, sft.main, *config) == f"model_name_or_path: runs/pocket/1_pretrain: {command} 1_pretrain`\n"
    Path("runs/pocket/1_pretrain").mkdir(parents=True)
    assert refusal(capsys, sft.main, *config) == f"dataset_name: runs/pocket/data: {command} 0_data`\n"
    config = ("--config", "recipes/pocket/4_grpo.yaml")
    assert refusal(capsys, grpo.main, *config) == f"model_name_or_path: runs/pocket/3_ppo: {command} 3_ppo`\n"
    assert sorted(path.name for path in Path("runs/pocket").iterdir()) == ["1_pretrain"]


def test_a_path_that_no_step_writes_is_a_mistake_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/pocket/data").mkdir(parents=True)
    err = refusal(capsys, sft.main, "--config", "recipes/pocket/2_sft.yaml", "--model_name_or_path", "./elsewhere")
    assert "first run" not in err and "elsewhere" in err
