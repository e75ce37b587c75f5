"""Steps under `accelerate launch`: their exit codes come through, and signals reach the workers."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from pipeline.runner.launcher import check_launch_file, main

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
        [*launcher, *options, "-m", "tests.helpers.stand_in_step", "--config", "step.yaml"],
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
    assert main(["--config_file", "launch.yaml", "-m", "tests.helpers.stand_in_step", "--config", "step.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--config_file: launch.yaml: is not a launch file") and error.count("\n") == 1


MACHINES = "num_machines: 2\nmain_process_ip: 10.1.2.3\n"


@pytest.mark.parametrize(
    ("content", "named", "says"),
    [
        (MACHINES, True, None),
        (MACHINES, False, "asks for other machines (num_machines, main_process_ip); name it with --config_file"),
        ("main_process_ip: 10.1.2.3\nrdzv_backend: c10d", False, "asks for other machines"),
        ("mpirun_config: {mpirun_hostfile: hosts}", False, "asks for other machines"),
        ("main_process_ip: 127.0.0.1\nrdzv_backend: static", False, None),
        ("mpirun_config: {rdzv_backend: c10d}", True, "mpirun_config has no option rdzv_backend; remove it"),
        ("deepspeed_config: {zero_stage: 2, main_process_ip: x}", True, "deepspeed_config has no option main_process"),
        ("megatron_lm_config: {log_dir: x}", True, "megatron_lm_config has no option log_dir"),
        ("parallelism_config: {training_script: x}", True, "parallelism_config has no option training_script"),
        ('num_machines: "2"', True, "num_machines is 2, but must be one of 0 to 65535"),
        ("num_machines: {a: 1}", True, "num_machines is {'a': 1}, but must be one of 0 to 65535"),
        ("machine_rank: [1]", True, "machine_rank is [1], but must be one of 0 to 65535"),
        ("deepspeed_config: a.json", True, "deepspeed_config must be a mapping; correct it"),
        ("mpirun_config: [a]", False, "mpirun_config must be a mapping; correct it"),
        ("fsdp_config: {1: 2}", True, "fsdp_config has no option 1; remove it"),
        ("commands: null\ntpu_env: []\ngpu_ids: all\ndowncast_bf16: 'no'", True, None),
        ("deepspeed_config: {zero_stage: 2, offload_param_device: none, gradient_clipping: 1.0}", False, None),
        ("fsdp_config: {fsdp_version: 2, offload_params: false}", False, None),
    ],
)
def test_a_launch_file_does_what_the_user_asked_for(project: Path, content: str, named: bool, says: str | None) -> None:
    Path("launch.yaml").write_text(f"distributed_type: MULTI_GPU\nnum_processes: 1\n{content}\n")
    problem = check_launch_file("launch.yaml", is_named=named)
    assert (problem is None) if says is None else (says in str(problem))


@pytest.mark.parametrize("mapping", ["fsdp_config", "fp8_config", "dynamo_config"])
def test_accelerate_adds_the_beginning_of_the_other_plugins_options_itself(project: Path, mapping: str) -> None:
    Path("launch.yaml").write_text(f"distributed_type: 'NO'\n{mapping}: {{main_process_ip: 10.1.2.3}}\n")
    args = launch_command_parser().parse_args(["--config_file", "launch.yaml", "step.py"])
    args, *_ = _validate_launch_command(args)
    assert args.main_process_ip is None


# -P: the script `accelerate` does not search the working folder either.
ACCELERATE = [sys.executable, "-P", "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_mistake_under_accelerate_launch_itself_ends_in_its_own_line_and_code(project: Path, processes: str) -> None:
    # The user's own modules may have the names of ours.
    for name in ("pipeline.py", "recipes.py"):
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
    step = ["-m", "tests.helpers.stand_in_step", "--config", "step.yaml"]
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


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_worker_which_may_save(project: Path, number: signal.Signals) -> None:
    process = launch(waits=True)
    wait_for(Path("out/pid"))
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert Path("out/checkpoint").read_text() == str(int(number))
    assert "Traceback" not in err


ALONE = "distributed_type: 'NO'\nnum_processes: 1\nnum_machines: 1\nmixed_precision: 'no'\n"


def test_a_process_without_a_group_has_the_time_that_it_needs_to_save(project: Path) -> None:
    """From 1.16 on, accelerate would kill it after five seconds."""
    Path("alone.yaml").write_text(ALONE)
    process = launch("--config_file", "alone.yaml", waits=True, saves=7)
    wait_for(Path("out/pid"))
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and Path("out/checkpoint").exists()
    assert "Traceback" not in err


def test_the_code_of_a_process_without_a_group_is_its_own(project: Path) -> None:
    Path("alone.yaml").write_text(ALONE)
    process = launch("--config_file", "alone.yaml", fails=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err == "the step's own message\n"


# Three seconds of imports pass before a recipe can handle a signal.
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_during_imports_leaves_no_traceback_and_no_process(project: Path, processes: str) -> None:
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", processes]
    process = subprocess.Popen(
        [*launcher, "-m", "recipes.sft", "--config", str(ROOT / "recipes/pocket/2_sft.yaml")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests in the background ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def recipes() -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            return [child for child in children if "recipes.sft" in child.cmdline() and has_mapped(child, "torch")]
        return []

    deadline = time.monotonic() + 120
    while len(workers := recipes()) < int(processes):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def has_mapped(process: psutil.Process, library: str) -> bool:
    """Return whether a process has begun to load a library."""
    return f"/{library}/" in Path(f"/proc/{process.pid}/maps").read_text()
