"""What the runner refuses before the first step runs, on recipe folders whose steps are stand-ins."""

import errno
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from tests.helpers.refusals import refused
from tests.runner.conftest import ROOT, Runner, configure, status


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
    expected = f"recipe: {recipe}: {expected}; give a folder with files such as 2_sft.yaml\n"
    assert refused(capsys, "run", recipe) == expected


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
    expected = refused(capfd, "run", "recipe", *dry).splitlines()
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
    values = {"model_name_or_path": None, "dataset_name": "/nowhere/a.jsonl", "env": [1], "optim_args": "foo"}
    configure(folder, "2_sft", warmup_steps=50, max_steps=2, load_best_model_at_end=True, **values)
    (folder / "3_reward.yaml").unlink()
    lines = sorted(refused(capfd, "run", "recipe").splitlines())
    for line, expected in zip(
        lines,
        (
            "2_sft: dataset_name: /nowhere/a.jsonl: there is no such file",
            "2_sft: env: [1]: must be a mapping",
            "2_sft: load_best_model_at_end: True: ",
            "2_sft: model_name_or_path: nothing: give a Hub id",
            "2_sft: optim_args: foo: ",
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
    message = refused(capsys, "run", "recipe")
    assert message.startswith(f"output_dir: runs/r/{name}: is not a directory; choose another one\n")


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
