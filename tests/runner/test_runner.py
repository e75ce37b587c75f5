"""The runner, on recipe folders whose steps are stand-ins that take no time (`stand_in_step.py`)."""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.runner import warm
from pipeline.runner.recipe import read_plan
from pipeline.runner.steps import Step
from pipeline.stages import STAGES
from tests.stand_in_run import end, start

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
            stand_in = replace(kind, module="stand_in_step", launched=False, measured=False)
            monkeypatch.setitem(STAGES, name, stand_in)
    monkeypatch.setattr(warm, "PRELOADED", ())  # the stand-in imports none of it


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


ALL = {"0_data", "0_random", "1_pretrain", "2_sft", "3_reward"}


def test_every_step_runs_once_and_its_command_is_shown(run: Runner) -> None:
    code, out, _ = run()
    assert code == 0
    assert times() == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}
    commands = [line for line in out.splitlines() if line.startswith("$ ")]
    assert commands[2] == "$ python -m stand_in_step --config recipe/1_pretrain.yaml"
    record = json.loads(Path("runs/r/run.json").read_text())
    assert record["steps"]["2_sft"]["seconds"] > 0
    assert record["recipe"] == "recipe"


def test_a_second_run_skips_all(run: Runner) -> None:
    run()
    before = identities()
    code, out, _ = run()
    assert code == 0
    assert "$ " not in out
    assert changed(before) == set()


def test_a_changed_field_runs_its_step_and_what_depends_on_it_again(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/2_sft/old.txt").touch()
    configure(folder, "2_sft", num_train_epochs=3)
    _, out, _ = run()
    assert "num_train_epochs: None -> 3" in out
    assert not Path("runs/r/2_sft/old.txt").exists()
    assert changed(before) == {"2_sft", "3_reward"}


def trashed() -> list[str]:
    """What lies in the run's trash, without the times at which it came there."""
    return sorted(str(Path(*path.parts[4:])) for path in Path("runs/r/.trash").rglob("*") if path.is_file())


def test_what_a_change_replaces_is_in_the_trash_and_only_force_deletes(folder: Path, run: Runner) -> None:
    run()
    Path("runs/r/2_sft/checkpoint-1").mkdir()
    Path("runs/r/2_sft/checkpoint-1/model").write_text("precious")
    record = Path("runs/r/run.json").read_bytes()
    configure(folder, "2_sft", num_train_epochs=3)
    _, out, _ = run("--dry-run")
    assert "moves runs/r/2_sft to .trash" in out
    _, out, _ = run()
    assert "moved runs/r/2_sft to runs/r/.trash/" in out and "what was there before is in runs/r/.trash/" in out
    replaced = ["2_sft/checkpoint-1/model", "2_sft/ran.txt", "3_reward/ran.txt"]
    assert trashed() == [*replaced, "logs/2_sft.log", "logs/3_reward.log", "run.json"]
    (time,) = Path("runs/r/.trash").iterdir()
    assert (time / "2_sft/checkpoint-1/model").read_text() == "precious"
    assert (time / "run.json").read_bytes() == record
    run("--from", "3_reward")
    assert len(list(Path("runs/r/.trash").iterdir())) == 2
    before = trashed()
    _, out, _ = run("--force", "2_sft")
    assert "removed runs/r/2_sft" in out
    assert trashed() == sorted([*before, "3_reward/ran.txt", "logs/3_reward.log", "run.json"]), "3_reward was not named"
    before = trashed()
    run("--force")
    assert trashed() == before


def test_a_run_that_is_not_changed_has_no_trash(run: Runner) -> None:
    run()
    run()
    assert not Path("runs/r/.trash").exists()


def test_a_step_with_more_steps_continues_and_what_depends_on_it_runs_again(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", max_steps=2)
    run()
    checkpoint = Path("runs/r/2_sft/checkpoint-2")
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2, "max_steps": 2}')
    before = identities()
    configure(folder, "2_sft", max_steps=5)
    _, out, _ = run("--dry-run")
    assert "continue 2_sft: goes on" in out and "moves runs/r/2_sft to .trash, without its checkpoints" in out
    _, out, _ = run("--until", "2_sft")
    assert "2_sft: goes on from its last checkpoint (max_steps: 2 -> 5), on the schedule of the new total" in out
    assert "moved runs/r/2_sft to runs/r/.trash/" in out and ", without checkpoint-*\n" in out
    assert times()["2_sft"] == 1 and checkpoint.exists() and trashed() == ["2_sft/ran.txt", "run.json"]
    assert Path("runs/r/logs/2_sft.log").read_text().count("$ ") == 2
    run()
    assert changed(before) == {"2_sft", "3_reward"}
    assert trashed() == ["2_sft/ran.txt", "3_reward/ran.txt", "logs/3_reward.log", "run.json", "run.json"]
    before = identities()
    run()
    assert changed(before) == set()


def status(capfd: pytest.CaptureFixture[str], run_dir: str = "runs/r") -> list[str]:
    """Return the lines of the run's status."""
    assert main(["status", run_dir]) == 0
    return capfd.readouterr().out.splitlines()


def test_status_of_a_finished_run_and_after_a_change(
    folder: Path, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    title, *lines, last = status(capfd)
    assert title == "runs/r: recipe" and last == "all steps are done"
    assert [line.split()[:2] for line in lines] == [[name, "done"] for name in read_names()]
    configure(folder, "2_sft", num_train_epochs=5)
    *_, sft, reward, last = status(capfd)
    assert re.match(r"2_sft +out of date +0 s +its configuration changed \(num_train_epochs: None -> 5\); about", sft)
    assert re.match(r"3_reward +out of date +0 s +depends on 2_sft; about", reward)
    assert "3 of 5 steps are done; the rest takes about " in last
    command = last.partition(": ")[2]
    assert command == "fourstage run recipe --output_dir runs/r"
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
    run(*command.split()[3:])
    assert status(capfd)[-1] == "all steps are done"


def read_names() -> list[str]:
    return [step.name for step in read_plan(Path("recipe")).steps if step.kind != "report"]


def test_status_of_a_run_that_was_cut_short(folder: Path, run: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    configure(folder, "2_sft", fails=7)
    run("--seed", "3")
    (checkpoint := Path("runs/r/2_sft/checkpoint-3")).mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 4}')
    *_, sft, reward, last = status(capfd)
    assert re.match(r"2_sft +cut short +0 s +saved up to step 3 of 4; about", sft)
    assert re.match(r"3_reward +not run yet +about", reward)
    assert last.endswith(": fourstage run recipe --seed 3 --output_dir runs/r")


def test_status_of_several_seeds_and_of_what_is_not_a_run(run: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    run("--seeds", "0", "1")
    assert [line for line in status(capfd) if line.startswith("runs/r")] == [
        "runs/r/seed0: recipe, seed 0", "runs/r/seed1: recipe, seed 1",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(["status", "recipe"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.startswith("RUN: recipe: is a recipe; its run is runs/r (")


def test_an_untrained_model_does_not_depend_on_how_it_is_trained(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    configure(folder, "1_pretrain", learning_rate=0.002)
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_a_changed_input_file_runs_its_step_again(folder: Path, run: Runner) -> None:
    Path("text.txt").write_text("one")
    configure(folder, "1_pretrain", dataset_name="text.txt")
    run()
    before = identities()
    Path("text.txt").write_text("two")
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_comments_and_the_order_of_fields_do_not_matter(folder: Path, run: Runner) -> None:
    run()
    before = identities()
    path = folder / "1_pretrain.yaml"
    values = yaml.safe_load(path.read_text())
    path.write_text("# a comment\n" + yaml.safe_dump(dict(reversed(values.items())), sort_keys=False))
    run()
    assert changed(before) == set()


def test_until_stops_and_a_run_without_it_continues(run: Runner) -> None:
    run("--until", "1_pretrain")
    before = identities()
    assert set(before) == {"0_data", "0_random", "1_pretrain"}
    run()
    assert changed(before) == {"2_sft", "3_reward"}


def test_outputs_of_outdated_inputs_are_made_again_later(run: Runner) -> None:
    run()
    before = identities()
    run("--force", "pretrain", "--until", "pretrain")
    assert changed(before) == {"1_pretrain"}
    run()
    assert changed(before) == {"1_pretrain", "2_sft", "3_reward"}


def test_from_runs_a_step_and_all_after_it(run: Runner) -> None:
    run()
    before = identities()
    run("--from", "sft")
    assert changed(before) == {"2_sft", "3_reward"}


def test_from_refuses_a_step_whose_inputs_have_not_been_made(run: Runner) -> None:
    code, _, err = run("--from", "2_sft")
    assert code == 2
    assert "--from: 1_pretrain: is needed first (has not run yet)" in err
    assert not Path("runs").exists()


def test_force_without_names_runs_all(run: Runner) -> None:
    run()
    before = identities()
    run("--force")
    assert changed(before) == ALL
    before = identities()
    run("--force", "--from", "sft")
    assert changed(before) == {"2_sft", "3_reward"}


def test_a_step_whose_output_is_gone_runs_again(run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/2_sft/ran.txt").unlink()
    Path("runs/r/2_sft").rmdir()
    run()
    assert changed(before) == {"2_sft", "3_reward"}


def test_data_corrected_by_hand_are_kept_and_what_learned_from_them_runs_again(run: Runner) -> None:
    run()
    before = identities()
    Path("runs/r/data/label.txt").write_text("the other one")
    _, out, _ = run("--dry-run")
    assert "skip 0_data: finished" in out and "run 1_pretrain: the data of 0_data were changed" in out
    run()
    assert changed(before) == ALL - {"0_data", "0_random"}
    assert Path("runs/r/data/label.txt").read_text() == "the other one"
    before = identities()
    run()
    assert changed(before) == set()


def test_dry_run_prints_why_and_writes_nothing(folder: Path, run: Runner) -> None:
    code, out, _ = run("--dry-run")
    assert code == 0
    assert "run 2_sft: has not run yet" in out
    assert not Path("runs").exists()
    run()
    configure(folder, "2_sft", num_train_epochs=3)
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    _, out, _ = run("--dry-run")
    assert "skip 1_pretrain: finished" in out
    assert "run 3_reward: depends on 2_sft" in out
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before


def test_output_dir_moves_every_path(run: Runner) -> None:
    run("--output_dir", "elsewhere/s")
    assert times("elsewhere/s") == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}
    assert "dataset_name=elsewhere/s/data" in Path("elsewhere/s/2_sft/ran.txt").read_text()
    assert not Path("runs").exists()


def test_a_run_that_was_moved_is_still_finished(run: Runner) -> None:
    run()
    Path("runs/r").rename("moved")
    _, out, _ = run("--output_dir", "moved")
    assert "$ " not in out


def test_the_seed_reaches_every_step_and_is_a_change(run: Runner) -> None:
    run("--seed", "1")
    before = identities()
    assert all("seed=1" in path.read_text() for path in Path("runs/r").glob("*/ran.txt"))
    assert json.loads(Path("runs/r/run.json").read_text())["seed"] == 1
    _, out, _ = run("--seed", "2")
    assert changed(before) == ALL
    assert out.startswith("replaces the run of seed 1, which is moved to runs/r/.trash/")
    assert "--output_dir runs/r/seed2 would keep both" in out


def test_a_failing_step_ends_the_run_with_its_message_and_code(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    code, out, err = run()
    assert code == 7
    assert err == "the step's own message\n"
    assert "2_sft failed with exit code 7" in out
    assert "3_reward" not in times()


def test_an_interrupted_step_resumes_from_what_it_saved(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    before = identities()
    code, out, _ = run()
    assert code == 0
    assert "2_sft: was interrupted" in out
    assert times()["2_sft"] == 2
    assert changed(before) == {"3_reward"}


def test_the_peak_memory_of_a_step_is_recorded_over_all_of_its_parts(folder: Path, run: Runner) -> None:
    def peak() -> int:
        return int(json.loads(path.read_text())["steps"]["2_sft"]["peak_memory"])

    path = Path("runs/r/run.json")
    for before, expected in ((10**15, 10**15), (None, None)):
        configure(folder, "2_sft", fails=7)
        run("--force", "2_sft")
        # A fresh start forgets what was before.
        assert 10**6 < peak() < 10**12
        record = json.loads(path.read_text())
        record["steps"]["2_sft"]["peak_memory"] = before
        # Earlier releases did not record it.
        if before is None:
            del record["steps"]["2_sft"]["peak_memory"]
        path.write_text(json.dumps(record))
        run()
        assert times()["2_sft"] == 2
        assert peak() == expected or (expected is None and 10**6 < peak() < 10**12)


def test_an_interrupted_step_whose_configuration_changed_starts_from_the_beginning(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    configure(folder, "2_sft", fails=0)
    run()
    assert times()["2_sft"] == 1


def test_a_directory_that_the_runner_did_not_write_is_kept(run: Runner) -> None:
    Path("runs/r/2_sft").mkdir(parents=True)
    Path("runs/r/2_sft/trained_by_hand").touch()
    run()
    assert Path("runs/r/2_sft/trained_by_hand").exists()


def test_tokens_are_not_written_to_disk(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", hub_token="hf_secret")
    run()
    assert "hf_secret" not in Path("runs/r/run.json").read_text()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["--until", "5_dpo"],
            "--until: 5_dpo: no such step; choose from: 0_data, 0_random, 1_pretrain, 2_sft, 3_reward",
        ),
        (["--force", "stf"], "--force: stf: no such step; choose from:"),
        (["--from", "3_reward", "--until", "2_sft"], "--from: 3_reward: comes after --until 2_sft"),
        (["--until", ""], "--until: '': is empty"),
        (["--from", "/"], "--from: /: no such step"),
        (["--num_processes", "0"], "--num_processes: 0: must be at least 1"),
        (["--num_processes", "two"], "fourstage run: argument --num_processes: invalid int value: 'two'"),
        (["--seed", "1e3"], "fourstage run: argument --seed: invalid int value: '1e3'"),
        (["--output_dir", ""], "--output_dir: '': is empty"),
        (["--output_dir", "."], "output_dir: .: is or contains the current directory"),
        (["--output_dir", ".."], "output_dir: ..: is or contains the current directory"),
        (["--output_dir", str(ROOT)], f"output_dir: {ROOT}: is or contains the current directory or this project"),
        (["--output_dir", "recipe"], "output_dir: recipe: is the recipe folder"),
        (["--output_dir", "recipe/2_sft.yaml"], "output_dir: recipe/2_sft.yaml: is not a directory"),
        (
            ["--output_dir", "recipe/2_sft.yaml/r"],
            "output_dir: recipe/2_sft.yaml/r: recipe/2_sft.yaml is not a directory",
        ),
        (["--output_dir", "/dev/null/r"], "output_dir: /dev/null/r: /dev/null is not a directory"),
        (["--from", "report"], "--from: report: no stage has been evaluated yet"),
        (["--output_dir", "loop/r"], "output_dir: loop/r: is not a valid path"),
        (["--output_dir", "dangling"], "output_dir: dangling: is a dangling symlink"),
        (["--output_dir", "r" * 280], f"output_dir: {'r' * 280}: is not a valid path"),
        (["--config_file", "no.yaml"], "--config_file: no.yaml: is not a launch file"),
        (["--seed", "-1"], "--seed: -1: must be between 0 and 4294967295"),
        (["--config_file", "recipe/2_sft.yaml"], "--config_file: recipe/2_sft.yaml: is not a launch file"),
    ],
)
def test_wrong_arguments_are_refused(run: Runner, argv: list[str], expected: str) -> None:
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("missing")
    before = sorted(Path().rglob("*"))
    code, _, err = run(*argv)
    assert code == 2
    assert err.startswith(expected) and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("missing", "does not exist"),
        ("loop", "cannot be read (Too many levels of symbolic links)"),
        ("recipe/2_sft.yaml", "cannot be read (Not a directory)"),
        ("n" * 280, "cannot be read (File name too long)"),
        ("empty", "does not contain a step"),
    ],
)
def test_what_is_not_a_recipe_folder_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], recipe: str, expected: str
) -> None:
    Path("loop").symlink_to("loop")
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["run", recipe])
    assert stop.value.code == 2
    expected = f"recipe: {recipe}: {expected}; give a folder with files such as 2_sft.yaml\n"
    assert capsys.readouterr().err == expected


def test_unreadable_files_of_a_folder_are_refused_and_nested_folders_ignored(folder: Path, run: Runner) -> None:
    (folder / "3_ppo").mkdir()
    (folder / f"{'9' * 200}_sft.yaml").write_text("output_dir: runs/r/last")
    assert run("--dry-run")[0] == 0
    (folder / "3_ppo.yaml").mkdir()
    (folder / "3_preferences.yaml").symlink_to("3_preferences.yaml")
    (folder / "4_grpo.yaml").write_bytes(b"\xff\xfe")
    code, _, err = run()
    assert code == 2
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        "recipe/3_ppo.yaml", "recipe/3_preferences.yaml", "recipe/4_grpo.yaml",
    ]  # fmt: skip
    assert not Path("runs").exists()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_late_step_that_would_be_refused_is_reported_before_the_first_one_runs(
    folder: Path, capfd: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    configure(folder, "0_data", size_mb="big")
    configure(folder, "3_reward", dataset_name="runs/r/data", learning_rat=0.1, max_steps=0)
    configure(folder, "2_sft", seed=-3)
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe", *dry])
    assert stop.value.code == 2
    expected = capfd.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in expected] == [
        ["0_data", " size_mb"], ["2_sft", " seed"], ["3_reward", " learning_rat"], ["3_reward", " max_steps"],
    ]  # fmt: skip
    assert "did you mean `learning_rate`?" in expected[2]
    assert not Path("runs").exists()


def test_two_files_of_one_step_are_refused(folder: Path, run: Runner) -> None:
    (folder / "2_sft.yml").write_text((folder / "2_sft.yaml").read_text())
    code, _, err = run()
    assert code == 2
    assert err.startswith("recipe: recipe/2_sft.yml: is the same step as 2_sft.yaml")


def test_a_path_that_cannot_follow_to_another_folder_is_refused(folder: Path, run: Runner) -> None:
    with (folder / "2_sft.yaml").open("a") as file:
        file.write("\nmodel_init_kwargs: {cache: runs/r/1_pretrain}\n")
    code, _, err = run("--output_dir", "runs/other")
    assert code == 2
    assert err.startswith("2_sft: model_init_kwargs: ") and "cannot follow --output_dir; write runs/other" in err


def test_settings_that_a_later_step_would_refuse_are_reported_before_the_first_one_runs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {"model_name_or_path": None, "dataset_name": "/nowhere/a.jsonl", "env": [1], "report_to": "nobody"}
    configure(folder, "2_sft", warmup_steps=50, max_steps=2, load_best_model_at_end=True, **values)
    (folder / "3_reward.yaml").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe"])
    assert stop.value.code == 2
    lines = sorted(capfd.readouterr().err.splitlines())
    for line, expected in zip(
        lines,
        (
            "2_sft: dataset_name: /nowhere/a.jsonl: there is no such file",
            "2_sft: env: [1]: must be a mapping",
            "2_sft: load_best_model_at_end: True: ",
            "2_sft: model_name_or_path: nothing: give a Hub id",
            "2_sft: report_to: nobody: no such tracker",
            "2_sft: warmup_steps: 50: is more than max_steps",
        ),
        strict=True,
    ):
        assert line.startswith(expected)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("num_processes: many", "num_processes is many"),
        ("num_processes: 0", "num_processes is 0"),
        ("mixed_precision: fp7", "mixed_precision is fp7"),
    ],
)
def test_a_launch_file_that_cannot_start_is_refused(folder: Path, run: Runner, content: str, expected: str) -> None:
    launch_file = Path("accelerate_config.yaml")
    kept = [line for line in launch_file.read_text().splitlines() if not line.startswith(content.split(":")[0])]
    launch_file.write_text("\n".join([*kept, content]))
    code, _, err = run()
    assert code == 2
    assert expected in err and err.count("\n") == 1


def test_all_mistakes_of_a_folder_are_reported_at_once(folder: Path, run: Runner) -> None:
    (folder / "4_gpro.yaml").write_text("output_dir: runs/r/4_gpro")
    (folder / "2_sft.yaml").write_text("output_dir: [")
    (folder / "3_reward.yaml").write_text("learning_rate: 1")
    code, _, err = run()
    assert code == 2
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        "recipe/2_sft.yaml, line 1",
        "recipe/3_reward.yaml",
        "recipe/4_gpro.yaml",
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"model_name_or_path": "runs/r/1_pretrian"},
            "2_sft: model_name_or_path: runs/r/1_pretrian: no earlier step",
        ),
        ({"output_dir": "runs/other/2_sft"}, "output_dir: recipe: the steps write to several runs"),
        ({"output_dir": "runs/r/data"}, "output_dir: runs/r/data: 0_data and 2_sft would write there"),
        (
            {"output_dir": ""},
            "output_dir: .: must lie in a directory of the run; write runs/NAME/2_sft in recipe/2_sft",
        ),
        ({"output_dir": "runs/r/.."}, "output_dir: runs/r/..: must lie in a directory of the run"),
        *(
            (
                {"output_dir": f"runs/r/{name}"},
                f"output_dir: runs/r/{name}: the runner writes there itself; rename it in",
            )
            for name in ("report", "Report", "evaluations", "logs", "0_random", "run.json", "run.lock", ".trash")
        ),
    ],
)
def test_paths_that_do_not_fit_are_refused(folder: Path, run: Runner, values: dict[str, str], expected: str) -> None:
    configure(folder, "2_sft", **values)
    code, _, err = run()
    assert code == 2
    assert err.startswith(expected)
    assert not Path("runs").exists()


def test_a_run_that_may_only_be_read_has_a_status_and_a_plan_but_does_not_run(
    run: Runner, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    run("--until", "2_sft")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert "5 steps are done" in status(capfd)[-1]
    assert run("--dry-run")[0] == 0
    code, _, err = run()
    assert code == 2 and err.startswith("output_dir: runs/r: no permission to write to runs/r (Permission denied)")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["2_sft", "evaluations", "report"])
def test_a_file_where_a_step_writes_is_refused_before_the_first_step(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path("runs/r").mkdir(parents=True)
    Path("runs/r", name).touch()
    with pytest.raises(SystemExit) as stop:
        main(["run", "recipe"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"output_dir: runs/r/{name}: is not a directory; choose another one\n")


SECONDS = '{"steps": {"2_sft": {"id": "a", "seconds": %s}}}'


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"steps": {"2_sft": {}}}', '{"steps": {"2_sft": null}}', '{"steps": []}', "[" * 100_000]
    + [SECONDS % number for number in ("NaN", "Infinity", "1e300", "-1", '"1"')],
)
def test_a_damaged_record_is_refused(run: Runner, content: str) -> None:
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/run.json").write_text(content)
    code, _, err = run()
    assert code == 2
    assert err.startswith("output_dir: runs/r/run.json: ") and err.endswith("; remove it\n") and err.count("\n") == 1


def test_the_machine_of_each_step_is_recorded(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    run()
    path = Path("runs/r/run.json")
    record = json.loads(path.read_text())
    for entry in record["steps"].values():
        assert entry["hardware"]["cores"] >= 1 and entry["hardware"]["system"]
        assert {"python", "torch", "transformers", "trl"} <= set(entry["versions"])
        assert "commit" in entry
        entry["hardware"] = {"system": "another machine"}
    path.write_text(json.dumps(record))
    run()
    systems = {name: entry["hardware"]["system"] for name, entry in json.loads(path.read_text())["steps"].items()}
    assert systems["1_pretrain"] == "another machine", "it was not run again"
    assert systems["2_sft"] != "another machine", "its last part ran here"


def test_a_finished_step_whose_module_was_renamed_is_skipped(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    for name, kind in list(STAGES.items()):
        if kind.module:
            monkeypatch.setitem(STAGES, name, replace(kind, module=f"renamed.{name}"))
    code, out, _ = run()
    assert code == 0 and "$ " not in out
    assert out.count("finished, skipped") == len(ALL)


def test_a_step_that_exits_with_0_but_without_its_product_has_failed(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", vanishes=True)
    code, out, _ = run()
    assert code == 1
    assert "2_sft failed: it ended without writing runs/r/2_sft" in out
    assert "3_reward" not in times()
    assert json.loads(Path("runs/r/run.json").read_text())["steps"]["2_sft"]["finished_at"] is None


def test_a_model_is_complete_once_its_configuration_and_its_weights_exist(folder: Path) -> None:
    step = next(step for step in read_plan(folder).steps if step.name == "2_sft")
    step.output.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        assert not step.is_complete
        (step.output / name).touch()
    assert step.is_complete


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(params=[[], ["--no-fork"]], ids=["fork", "new process"])
def waiting(request: pytest.FixtureRequest, folder: Path) -> Iterator[BaseProcess]:
    """A run whose `2_sft` is running."""
    configure(folder, "2_sft", waits=True)
    process = start("recipe", *request.param, environment=os.environ)
    wait_for(Path("runs/r/2_sft/pid"))
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_step_which_may_save(waiting: BaseProcess, run: Runner, number: signal.Signals) -> None:
    os.kill(waiting.pid, number)
    assert end(waiting) == 128 + number
    out, err = Path("out").read_text(), Path("err").read_text()
    assert Path("runs/r/2_sft/checkpoint").read_text() == str(int(number))
    assert f"2_sft was stopped by {number.name}\nkept: the steps before it\n" in out
    assert "to resume: fourstage run recipe\n" in out
    assert "Traceback" not in err
    code, out, _ = run()
    assert code == 0
    assert "2_sft: was interrupted" in out


def test_a_second_run_in_the_same_directory_is_refused(
    waiting: BaseProcess, run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    assert any(re.match("2_sft +running", line) for line in status(capfd))
    code, _, err = run()
    assert code == 2
    assert err.startswith(f"output_dir: runs/r: process {waiting.pid} is writing there")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child that its parent has died")
def test_after_the_runner_was_killed_its_step_saves_and_the_next_run_resumes(waiting: BaseProcess, run: Runner) -> None:
    waiting.kill()
    assert end(waiting) == -signal.SIGKILL
    code, out, _ = run()
    assert code == 0
    assert "2_sft: was interrupted" in out
    assert Path("runs/r/2_sft/checkpoint").read_text() == str(int(signal.SIGTERM))


def test_the_commands_of_a_recipe_are_those_that_a_user_types(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--dry-run", "--until", "sft", "--num_processes", "2", "--output_dir", "x"]
    assert main(["run", "recipe", *argv]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    launch = "accelerate launch --config_file accelerate_config.yaml --num_processes 2 -m"
    pretrain = "--config recipe/1_pretrain.yaml --output_dir x"
    sft = "--config recipe/2_sft.yaml --output_dir x/2_sft"
    assert shown == [
        "python -m recipes.data --config recipe/0_data.yaml --output_dir x/data",
        f"python -m recipes.untrained {pretrain}/0_random --dataset_name x/data",
        "fourstage evaluate x --stage 0_random",
        f"{launch} recipes.pretrain {pretrain}/1_pretrain --dataset_name x/data",
        "fourstage evaluate x --stage 1_pretrain",
        f"{launch} recipes.sft {sft} --model_name_or_path x/1_pretrain --dataset_name x/data",
        "fourstage evaluate x --stage 2_sft",
        "fourstage report x",
    ]


def test_steps_of_one_number_run_in_the_order_of_training(folder: Path) -> None:
    for name in ("3_ppo", "3_preferences", "0_tokenizer"):
        (folder / f"{name}.yaml").write_text(f"output_dir: runs/r/{name}")
    names = [step.name for step in read_plan(folder).steps if step.kind not in ("evaluate", "report")]
    assert names == [
        "0_data",
        "0_tokenizer",
        "0_random",
        "1_pretrain",
        "2_sft",
        "3_preferences",
        "3_reward",
        "3_ppo",
    ]


def test_smoke_is_two_steps_of_a_miniature_beside_the_run(folder: Path) -> None:
    configure(folder, "1_pretrain", max_steps=5000, max_train_samples=100)
    plan = read_plan(folder, smoke=True)
    assert plan.run_dir == Path("runs/r-smoke")
    arguments = {step.name: " ".join(step.arguments) for step in plan.steps}
    assert "--max_steps 2" in arguments["1_pretrain"]
    assert "--max_train_samples" not in arguments["1_pretrain"]
    assert "--hidden_size 64" in arguments["0_random"]
    assert "--limit" in arguments["evaluate_2_sft"]
    assert all(step.output.parts[:2] == ("runs", "r-smoke") for step in plan.steps)


def test_lists_of_paths_move_with_the_run(folder: Path) -> None:
    values = {"output_dir": "runs/r/4_grpo", "reward_funcs": ["correctness", "runs/r/3_reward"]}
    (folder / "4_grpo.yaml").write_text(yaml.safe_dump(values))
    step = next(step for step in read_plan(folder, Path("x")).steps if step.name == "4_grpo")
    assert " ".join(step.arguments).endswith("--reward_funcs correctness x/3_reward")
    assert step.needs == ("3_reward",)


# Stands in for the evaluation of a stage: one figure, which is 0.5 + seed / 100.
EVALUATION = """
import json, sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    path.parent.mkdir(exist_ok=True)
    value = 0.5 + json.loads((path.parents[1] / "run.json").read_text())["seed"] / 100
    entry = {"value": value, "ci95": [value - 0.01, value + 0.01], "n": 100}
    path.write_text(json.dumps({"metrics": {"pass@1": entry}}))
"""


@pytest.fixture
def measured(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """`2_sft` is evaluated by a stand-in. The folder has a `pipeline.py` of its own, which no step may run."""
    Path("pipeline.py").write_text("raise SystemExit(f'{__file__} was run')")
    executable = Step.executable

    def stand_in(step: Step, launch: list[str], launcher: Sequence[str] = ()) -> list[str]:
        evaluation = [sys.executable, "-c", EVALUATION, str(step.leftovers[0])] if step.kind == "evaluate" else []
        return evaluation or executable(step, launch, launcher)

    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], measured=True))
    monkeypatch.setattr(Step, "is_complete", property(lambda step: step.product.exists()))
    monkeypatch.setattr(Step, "executable", stand_in)


def read_report(run_dir: str = "runs/r") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(run_dir, "report/metrics.json").read_text())
    return content


def test_each_of_several_seeds_is_the_run_with_that_seed(run: Runner) -> None:
    assert run("--seeds", "3", "1")[0] == 0
    for seed in (3, 1):
        run("--seed", str(seed), "--output_dir", f"alone/seed{seed}")
        several, alone = (json.loads(Path(top, f"seed{seed}/run.json").read_text()) for top in ("runs/r", "alone"))
        assert several["seed"] == alone["seed"] == seed
        for name, entry in alone["steps"].items():
            assert several["steps"][name]["values"] == entry["values"]
            assert several["steps"][name]["command"] == entry["command"].replace("alone/", "runs/r/")
        _, out, _ = run("--seed", str(seed), "--output_dir", f"runs/r/seed{seed}")
        assert "$ " not in out, "it is finished for the runner of one seed as well"
    _, out, _ = run("--seeds", "3", "1")
    assert "$ " not in out
    assert times("runs/r/seed1") == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}


def test_several_seeds_have_a_report(run: Runner, measured: None) -> None:
    assert run("--seeds", "0", "2")[0] == 0
    summary = read_report()
    assert [of_run["seed"] for of_run in summary["runs"]] == [0, 2]
    assert summary["stages"]["2_sft"]["pass@1"]["values"] == pytest.approx([0.5, 0.52])
    assert read_report("runs/r/seed2")["stages"]["2_sft"]["pass@1"]["value"] == pytest.approx(0.52)
    assert run("--seeds", "0", "2", "4", "--until", "sft")[0] == 0
    assert read_report()["stages"]["2_sft"]["pass@1"]["n"] == 3
    assert run("--seeds", "4")[0] == 0
    assert read_report()["stages"]["2_sft"]["pass@1"]["n"] == 1


def test_before_anything_is_measured_several_seeds_have_no_report(run: Runner, measured: None) -> None:
    assert run("--seeds", "0", "1", "--until", "pretrain")[0] == 0
    assert Path("runs/r/seed1/1_pretrain").exists() and not Path("runs/r/report").exists()


def test_a_run_that_lies_there_is_kept_but_for_its_report(run: Runner, measured: None) -> None:
    run("--seed", "7")
    before = {path: path.read_bytes() for path in Path("runs/r").rglob("*") if path.is_file()}
    assert run("--seeds", "0", "1")[0] == 0
    for path, content in before.items():
        assert path.parent.name == "report" or path.read_bytes() == content
    assert len(read_report()["runs"]) == 2
    _, out, _ = run("--seed", "7")
    assert "$ " not in out


def test_options_apply_to_every_seed(run: Runner) -> None:
    code, out, _ = run("--seeds", "0", "1", "--dry-run", "--output_dir", "x")
    assert code == 0 and out.count("run 2_sft: has not run yet") == 2
    assert "seed 1, in x/seed1:" in out and "--output_dir x/seed1/2_sft" in out and not Path("x").exists()
    run("--seeds", "0", "1", "--smoke", "--until", "pretrain")
    assert sorted(path.name for path in Path("runs/r-smoke").glob("seed*")) == ["seed0", "seed1"]
    run("--seeds", "0", "1", "--output_dir", "x")
    for argv in (["--force", "sft"], ["--from", "sft"]):
        _, out, _ = run("--seeds", "0", "1", "--output_dir", "x", *argv)
        assert out.count("2_sft: finished, but asked to run again") == 2 and "-m stand_in_step" in out
        assert times("x/seed1")["1_pretrain"] == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seeds", "0", "1", "--seed", "2"], "argument --seed: not allowed with argument --seeds"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--seeds", "0", "-1"], "--seeds: -1: must be between 0 and 4294967295"),
        (["--seeds", "0", "1", "0"], "--seeds: 0: is repeated; name each seed once"),
        (["--seeds", "0", "1", "--until", "dpo"], "--until: dpo: no such step"),
        (["--seeds", "0", "1", "--output_dir", "recipe/2_sft.yaml"], "output_dir: recipe/2_sft.yaml: is not a dir"),
    ],
)
def test_wrong_seeds_are_refused(run: Runner, argv: list[str], expected: str) -> None:
    code, _, err = run(*argv)
    assert code == 2
    assert expected in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_mistake_in_a_later_seed_is_found_before_the_first_one_runs(run: Runner) -> None:
    Path("runs/r/seed1").mkdir(parents=True)
    for name in ("2_sft", "3_reward"):
        Path("runs/r/seed1", name).touch()
    code, _, err = run("--seeds", "0", "1", "2")
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == ["runs/r/seed1/2_sft", "runs/r/seed1/3_reward"]
    assert not Path("runs/r/seed0").exists()


def test_a_seed_that_fails_ends_the_command_which_then_goes_on(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    code, out, _ = run("--seeds", "0", "1")
    assert code == 7
    assert "seed 0 ended with exit code 7" in out
    assert not Path("runs/r/seed1").exists()
    code, out, _ = run("--seeds", "0", "1")
    assert code == 7 and "2_sft: was interrupted" in out and "seed 1 ended with exit code 7" in out
    code, out, _ = run("--seeds", "0", "1")
    assert code == 0
    assert times("runs/r/seed0")["1_pretrain"] == times("runs/r/seed1")["1_pretrain"] == 1


def test_several_seeds_are_stopped_by_a_signal_locked_and_resumed(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", waits=True)
    process = start("recipe", "--seeds", "0", "1", environment=os.environ)
    wait_for(Path("runs/r/seed0/2_sft/pid"))
    for argv in (["--seeds", "1"], [], ["--seed", "0", "--output_dir", "runs/r/seed0"]):
        code, _, err = run(*argv)
        assert code == 2 and f"process {process.pid} is writing there" in err
    os.kill(process.pid, signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM
    assert "to resume: fourstage run recipe --seeds 0 1\n" in Path("out").read_text()
    assert not Path("runs/r/seed1").exists()
    code, out, _ = run("--seeds", "0")  # the other one would wait for a signal
    assert code == 0 and "2_sft: was interrupted" in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child that its parent has died")
def test_several_seeds_that_were_killed_go_on(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", waits=True)
    process = start("recipe", "--seeds", "0", "1", environment=os.environ)
    wait_for(Path("runs/r/seed0/2_sft/pid"))
    process.kill()
    assert end(process) == -signal.SIGKILL
    Path("runs/r/seed1/2_sft").mkdir(parents=True)
    Path("runs/r/seed1/2_sft/checkpoint").touch()  # there it does not wait
    code, out, _ = run("--seeds", "0", "1")
    assert code == 0
    assert "2_sft: was interrupted" in out
    assert times("runs/r/seed0")["1_pretrain"] == 1 and "3_reward" in times("runs/r/seed1")
