"""Settings that are not active are refused, threads follow one rule, and one run at a time writes to a directory."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainingArguments
from trl import SFTConfig

from pipeline import files, hardware, launch
from pipeline.config import output_directory
from pipeline.config.checks import check_together
from pipeline.config.parser import parse
from pipeline.errors import RunStopped, UserError
from pipeline.runner import processes
from tests.benchmarks import gpu
from tests.benchmarks.gpu_bench import Bench, Failed, Line, at_most
from tests.helpers.emulated_gpus import GROUP_OF_ONE, emulated_gpus
from tests.helpers.small_model import ROOT

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.fixture
def args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True)


def test_nothing_is_wrong_with_one_process(args: TrainingArguments) -> None:
    assert launch.check_launch(args) == []


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("WORLD_SIZE", "2", "num_processes: 2: only 1 would train together"),
        ("ACCELERATE_USE_FSDP", "true", "distributed_type: FSDP: is never active on CPUs"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type: DeepSpeed: is never active on CPUs"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision: fp16: this machine lacks it"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision: fp8: is not supported"),
    ],
)
def test_requested_settings_that_are_not_active_are_refused(
    args: TrainingArguments, variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (problem,) = launch.check_launch(args)
    assert str(problem).startswith(said)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2: is set without RANK and LOCAL_RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "WORLD_SIZE: 2: is set without RANK"),
    ],
)
def test_a_group_that_cannot_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        launch.prepare_process()
    assert str(refusal.value).startswith(expected)


def test_a_group_of_one_is_left_and_a_group_of_two_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, left in (("1", True), ("2", False)):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        launch.prepare_process()
        assert ("RANK" not in os.environ) is left


@pytest.mark.parametrize("variables", [GROUP_OF_ONE, {}])
def test_one_process_trains_on_one_gpu_with_its_own_batch(tmp_path: Path, variables: dict[str, str]) -> None:
    options = ["--output_dir", str(tmp_path), "--per_device_train_batch_size", "16"]
    with emulated_gpus(4):
        for name in GROUP_OF_ONE.keys() - variables.keys():
            # `python -m recipes.sft` runs without these variables.
            del os.environ[name]
        (args,) = parse(SFTConfig, argv=options)
        assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 16, 8)
        assert (str(args.device), args.parallel_mode.value, args.bf16) == ("cuda:0", "not_parallel", True)


def test_each_of_several_processes_trains_on_its_own_gpu(tmp_path: Path) -> None:
    with emulated_gpus(4, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"):
        (args,) = parse(SFTConfig, argv=["--output_dir", str(tmp_path)])
        assert (args.n_gpu, args.world_size, str(args.device)) == (1, 2, "cuda:1")


@pytest.mark.parametrize("place", ["command line", "config"])
def test_use_cpu_wins_over_a_gpu(place: str, tmp_path: Path) -> None:
    """All choices are then those of a machine without a GPU, also if they were made before the arguments are read."""
    config = tmp_path / "config.yaml"
    options = ["--config", str(config), "--output_dir", str(tmp_path / "out")]
    if place == "config":
        config.write_text("use_cpu: true")
    else:
        config.write_text("seed: 1")
        options.append("--use_cpu")
    with emulated_gpus(1):
        assert hardware.attention().value == "varlen", "the choice for the GPU, before the arguments are read"
        with patch.object(hardware, "keep_freed_memory") as memory, patch("torch.set_num_threads") as threads:
            (args,) = parse(SFTConfig, argv=options)
        assert (hardware.accelerator(), hardware.attention().value) == (None, "blockwise")
        assert (args.device.type, args.bf16) == ("cpu", hardware.precision().value == "bf16")
        assert args.dataloader_pin_memory is False and memory.called and threads.called
    assert hardware.accelerator() is None and "ACCELERATE_USE_CPU" not in os.environ


@pytest.mark.parametrize("launched", [True, False])
def test_one_process_shards_if_the_launch_file_says_so_or_refuses(tmp_path: Path, launched: bool) -> None:
    options = ["--output_dir", str(tmp_path), "--bf16", "false"]
    with emulated_gpus(2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"):
        if launched:
            (args,) = parse(SFTConfig, argv=options)
            assert (args.n_gpu, args.world_size, args.parallel_mode.value) == (1, 1, "distributed")
            state = Accelerator().state
            assert state.distributed_type == "FSDP"
            trainer: Any = SimpleNamespace(args=args, is_fsdp_enabled=True, is_deepspeed_enabled=False)
            launch.check_active(trainer)
            trainer.is_fsdp_enabled = False
            with pytest.raises(UserError, match="distributed_type: FSDP: is not active"):
                launch.check_active(trainer)
            return
        for name in GROUP_OF_ONE:
            del os.environ[name]
        with pytest.raises(UserError, match="distributed_type: FSDP: needs a process group"):
            parse(SFTConfig, argv=options)


@pytest.mark.parametrize("deepspeed_option", [{"deepspeed": "zero3.json"}, {}])
def test_muon_is_refused_where_deepspeed_flattens_matrices(
    deepspeed_option: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [SimpleNamespace(use_muon=True, **deepspeed_option)]
    if not deepspeed_option:
        assert check_together(arguments, (), ()) == []
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    (problem,) = check_together(arguments, (), ())
    assert str(problem).startswith("use_muon: True: needs matrices")


def test_the_checks_of_a_machine_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    output = capsys.readouterr().out
    for check in gpu.CHECKS:
        assert check.name in output and f"needs {check.needs}" in output


def test_checks_of_a_machine_stop_at_a_difference_and_resume_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    figure = 3.0

    def first(bench: Bench) -> Iterator[Line]:
        ran.append("first")
        yield at_most("a figure", 1, 2)

    def second(bench: Bench) -> Iterator[Line]:
        ran.append("second")
        yield at_most("another one", figure, 2)
        ran.append("beyond it")

    def fails(bench: Bench) -> Iterator[Line]:
        yield at_most("a figure", 1, 2)
        raise Failed("exit code 1")

    checks = [gpu.Check(check, gpus=0) for check in (first, second, fails)]
    bench = Bench(tmp_path, gpus=0, quick=True)
    checks.insert(0, gpu.Check(fails, gpus=2))
    assert gpu.run_checks(bench, checks) == 1 and ran == ["first", "second"]
    output = capsys.readouterr().out
    assert "DIFFERS another one\n          expected at most 2, measured 3" in output and "with 2 GPUs" in output
    # With the machine mended, it resumes at the second check.
    figure = 2.0
    assert gpu.run_checks(bench, checks) == 1 and ran == ["first", "second", "second", "beyond it"]
    assert "FAILED exit code 1" in capsys.readouterr().out
    assert gpu.run_checks(bench, checks, ["first"]) == 0 and ran[-1] == "first", "a check that is named runs again"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, hardware.Choice(8, "8 cores for 1 process(es)")),
        ({"OMP_NUM_THREADS": "3"}, hardware.Choice(3, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "1"}, hardware.Choice(1, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "1", **LAUNCHED}, hardware.Choice(8, "8 cores for 1 process(es)")),
        (
            {"OMP_NUM_THREADS": "1", **LAUNCHED, "LOCAL_WORLD_SIZE": "2"},
            hardware.Choice(4, "8 cores for 2 process(es)"),
        ),
        (
            {"OMP_NUM_THREADS": "2", **LAUNCHED},
            hardware.Choice(2, "num_cpu_threads_per_process of the launch file"),
        ),
    ],
)
def test_without_a_number_of_threads_the_cores_are_shared(
    environment: dict[str, str], threads: hardware.Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 8)
    monkeypatch.setattr(hardware.psutil.Process, "parents", lambda process: [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hardware.threads() == threads


@pytest.mark.parametrize(
    ("users_choice", "reason"), [({}, r"\d+ cores for 2 process\(es\)"), ({"OMP_NUM_THREADS": "1"}, "OMP_NUM_THREADS")]
)
def test_under_a_launcher_only_the_users_number_of_threads_counts(
    users_choice: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """The launcher sets OMP_NUM_THREADS to 1, which is not the user's choice."""
    # A single write, because the lines of two processes may mix.
    code = 'import os\nfrom pipeline import hardware\nos.write(1, f"{hardware.threads().reason}\\n".encode())\n'
    (tmp_path / "step.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = ["accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(ROOT / "accelerate_config.yaml"), "-m", "step"],
        env={**environment, **users_choice, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.split("\n")[:2]
    assert len(lines) == 2 and all(re.fullmatch(reason, line) for line in lines), lines


def test_the_runner_does_not_choose_a_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = f"import os, pathlib; pathlib.Path({str(tmp_path / 'out')!r}).write_text(' '.join(os.environ))"
    assert processes.run_command([sys.executable, "-c", code], os.environ, ())[:2] == (0, None)
    names = (tmp_path / "out").read_text().split()
    assert "OMP_NUM_THREADS" not in names and "HF_HUB_DISABLE_TELEMETRY" in names


def test_every_choice_has_a_reason() -> None:
    choices = {
        **hardware.training_defaults(),
        "threads": hardware.threads(),
        "compile": hardware.compilation(1e20),
    }
    assert all(choice.reason for choice in choices.values())
    assert hardware.compilation(1.0).value is False


@contextmanager
def held_elsewhere(path: Path, inside: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock until it is killed."""
    code = f"""
import sys, time
from pathlib import Path
from pipeline.files import lock
with lock(Path(sys.argv[1])) as descriptors:
    {inside.replace(chr(10), chr(10) + "    ")}
    print(1, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield process
        process.kill()


def take(path: Path, orphans_only: bool = False) -> None:
    with files.lock(path, orphans_only):
        pass


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    path = tmp_path / "output" / ".lock"
    with held_elsewhere(path) as other:
        with pytest.raises(UserError, match=rf"output_dir: {path.parent}: process {other.pid} is writing there"):
            take(path)
        other.kill()
        other.wait()
        # A killed process does not hold the lock.
        take(path)
    take(path)


@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_without_locks_of_the_kernel_a_warning_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    def flock(descriptor: object, operation: int) -> None:
        raise OSError(getattr(errno, error), "not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    take(tmp_path / ".lock")
    assert "make sure that no other run writes there" in caplog.text


def test_a_child_keeps_the_lock_of_its_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a step whose runner was killed still keeps others from writing to the run."""
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    path = tmp_path / "run.lock"
    start_child = """
import subprocess, sys
child = [sys.executable, "-c", "import sys; sys.stdin.read()"]
process = subprocess.Popen(child, stdin=0, stdout=subprocess.DEVNULL, pass_fds=descriptors, preexec_fn=lambda: None)
"""
    with held_elsewhere(path, inside=start_child) as parent:
        parent.kill()
        parent.wait()
        with pytest.raises(UserError, match=f"process {parent.pid} is writing there"):
            take(path, orphans_only=True)
        assert parent.stdin is not None
        # The child ends when its input does.
        parent.stdin.close()
        monkeypatch.setattr(files, "LOCK_SECONDS", 30.0)
        take(path, orphans_only=True)


def test_with_orphans_only_a_living_process_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with held_elsewhere(path) as other:
        started = time.monotonic()
        with pytest.raises(UserError, match=f"process {other.pid} is writing there"):
            take(path, orphans_only=True)
        assert time.monotonic() - started < files.LOCK_SECONDS / 4


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        take(tmp_path / "file" / "below" / ".lock")


def test_only_settings_that_affect_the_weights_must_stay_the_same(tmp_path: Path) -> None:
    def arguments(**changes: object) -> TrainingArguments:
        options: dict[str, Any] = {"use_cpu": True, "learning_rate": 1e-3, **changes}
        args = TrainingArguments(str(tmp_path), **options)
        setattr(args, output_directory.RESOLVED, output_directory.to_record([args]))
        return args

    output_directory.record_arguments(arguments(hub_token="hf_secret"))
    assert "hf_secret" not in (tmp_path / output_directory.RECORD).read_text()
    assert output_directory.check_output_directory([arguments()]) == []
    assert (
        output_directory.check_output_directory([arguments(logging_steps=3, save_steps=7, eval_strategy="epoch")]) == []
    )
    (problem,) = output_directory.check_output_directory([arguments(learning_rate=2e-3, seed=1)])
    assert "learning_rate was 0.001 and is 0.002; seed was 42 and is 1" in str(problem)
    # Without a checkpoint, it cannot be resumed.
    for change in ({"torch_compile": True}, {"max_steps": 10}):
        assert output_directory.check_output_directory([arguments(**change)])
    default = arguments(weight_decay=0.5, bf16=True)
    assert "bf16 was False" in str(output_directory.check_output_directory([default])[0])
    assert "bf16" not in str(output_directory.check_output_directory([default], machine_fields={"bf16"})[0]), (
        "another machine"
    )


def test_the_end_of_one_process_is_reported_by_it_alone() -> None:
    """The others lose their connection to it, with errors that say nothing."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="closed by peer"), launch.stop_as_one():
            raise RuntimeError("Connection closed by peer")
        with pytest.raises(RunStopped), launch.stop_as_one():
            raise RunStopped("The loss became nan.", exit_code=7)
        with pytest.raises(SystemExit) as ended, launch.stop_as_one():
            raise RuntimeError("Connection closed by peer")
        with pytest.raises(TypeError), launch.stop_as_one():
            raise TypeError("a defect")
    finally:
        torch.distributed.destroy_process_group()
    assert ended.value.code == 7


def test_without_a_group_errors_are_as_they_were() -> None:
    with pytest.raises(RuntimeError, match="a defect"), launch.stop_as_one():
        raise RuntimeError("a defect")
