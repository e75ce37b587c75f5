"""Steps under `accelerate launch`: their exit codes come through, and signals reach the workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.runner.launcher import main

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, from which the stand-in step can be launched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{TESTS}")
    return tmp_path


def launch(*options: str, **settings: object) -> subprocess.Popen[str]:
    """Launch the stand-in step with these settings."""
    Path("step.yaml").write_text(yaml.safe_dump({"output_dir": "out", **settings}))
    launcher = [
        sys.executable,
        "-m",
        "pipeline.runner.launcher",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
    ]
    return subprocess.Popen(
        [*launcher, *options, "-m", "stand_in_step", "--config", "step.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_exit_code_is_the_programs_own_and_nothing_is_added(project: Path) -> None:
    process = launch(fails=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err == "the step's own message\n"


@pytest.mark.parametrize("content", ["a: [", "hello", "", "mixed_precision: fp12", "num_process: 1"])
def test_a_broken_launch_file_is_reported_in_one_line(
    project: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    Path("launch.yaml").write_text(content)
    assert main(["--config_file", "launch.yaml", "-m", "stand_in_step", "--config", "step.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--config_file: launch.yaml: is not a launch file") and error.count("\n") == 1


# -P: the script `accelerate` does not search the working folder either.
ACCELERATE = [sys.executable, "-P", "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_mistake_under_accelerate_launch_itself_ends_in_its_own_line_and_code(project: Path, processes: str) -> None:
    for name in ("pipeline.py", "recipes.py"):  # of the user
        Path(name).write_text("raise SystemExit(f'{__file__} was run')")
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", processes]
    step = ["-m", "recipes.sft", "--config", str(ROOT / "recipes/pocket/2_sft.yaml"), "--learning_rat", "1"]
    done = subprocess.run([*launcher, *step], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("learning_rat: 1: ") and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].split(":")[0] in ("learning_rat", "model_name_or_path", "dataset_name")


def test_a_launcher_of_other_programs_is_left_alone(project: Path) -> None:
    Path("step.yaml").write_text(yaml.safe_dump({"output_dir": "out", "fails": 2}))
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml")]
    step = ["-m", "stand_in_step", "--config", "step.yaml"]
    done = subprocess.run([*launcher, *step], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "ChildFailedError" in done.stderr


def test_success_is_0(project: Path) -> None:
    process = launch()
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_as_many_processes_as_asked_for_are_started(project: Path) -> None:
    process = launch("--num_processes", "2")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(Path("out/ran.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_worker_which_may_save(project: Path, number: signal.Signals) -> None:
    process = launch(waits=True)
    deadline = time.monotonic() + 120
    while not Path("out/pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert Path("out/checkpoint").read_text() == str(int(number))
    assert "Traceback" not in err
