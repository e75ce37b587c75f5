"""A recipe folder whose steps are stand-ins that take no time (`stand_in_step.py`), and what runs it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.runner import processes
from pipeline.stages import STAGES

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# What each stand-in's YAML file holds; the run lies in `runs/r` of the current directory.
RECIPE = {
    "0_data": {"output_dir": "runs/r/data", "size_mb": 1},
    "1_pretrain": {
        "output_dir": "runs/r/1_pretrain",
        "dataset_name": "runs/r/data",
        "learning_rate": 0.001,
        "max_position_embeddings": 1024,
    },
    "2_sft": {
        "output_dir": "runs/r/2_sft",
        "model_name_or_path": "runs/r/1_pretrain",
        "dataset_name": "runs/r/data",
    },
    "3_reward": {"output_dir": "runs/r/3_reward", "model_name_or_path": "runs/r/2_sft"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project with the recipe folder `recipe`, as the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{TESTS}")
    (tmp_path / "accelerate_config.yaml").write_text((ROOT / "accelerate_config.yaml").read_text())
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    for name, values in RECIPE.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return recipe


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is a stand-in, and nothing is evaluated."""
    for name, kind in list(STAGES.items()):
        if kind.module:
            stand_in = replace(kind, module="tests.helpers.stand_in_step", launched=False, measured=False)
            monkeypatch.setitem(STAGES, name, stand_in)
    # The stand-in imports none of the libraries.
    monkeypatch.setattr(processes, "PRELOADED", ())


@pytest.fixture
def run(folder: Path, stand_ins: None, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; returns its exit code, and what it wrote to stdout and stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(["run", "recipe", *argv])
        except SystemExit as stop:
            code = int(str(stop.code))
        out, err = capfd.readouterr()
        return code, out, err

    return run


Runner = Callable[..., tuple[int, str, str]]


def configure(folder: Path, name: str, **values: object) -> None:
    """Change fields of a step's YAML file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def times(run_dir: str = "runs/r") -> dict[str, int]:
    """Directory -> how often the stand-in has run there since the directory was emptied."""
    counts = {path.parent.name: len(path.read_text().splitlines()) for path in Path(run_dir).glob("*/ran.txt")}
    return dict(sorted(counts.items()))


def identities() -> dict[str, str]:
    """Step -> identity of its last run from the start."""
    return {name: step["id"] for name, step in json.loads(Path("runs/r/run.json").read_text())["steps"].items()}


def changed(before: dict[str, str]) -> set[str]:
    """The steps that have run from the start since `before`."""
    return {name for name, identity in identities().items() if before.get(name) != identity}


def status(capfd: pytest.CaptureFixture[str], run_dir: str = "runs/r") -> list[str]:
    """Return the lines of the run's status."""
    assert main(["status", run_dir]) == 0
    return capfd.readouterr().out.splitlines()


ALL = {"0_data", "0_random", "1_pretrain", "2_sft", "3_reward"}
