"""Runs that are stopped or killed, on recipe folders whose steps are stand-ins."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.helpers.stand_in_run import end, start
from tests.runner.conftest import Runner, configure, status, times


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
    # The step of the other seed would wait for a signal.
    code, out, _ = run("--seeds", "0")
    assert code == 0 and "2_sft: was interrupted" in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child that its parent has died")
def test_several_seeds_that_were_killed_go_on(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", waits=True)
    process = start("recipe", "--seeds", "0", "1", environment=os.environ)
    wait_for(Path("runs/r/seed0/2_sft/pid"))
    process.kill()
    assert end(process) == -signal.SIGKILL
    Path("runs/r/seed1/2_sft").mkdir(parents=True)
    # The step does not wait where it finds a checkpoint.
    Path("runs/r/seed1/2_sft/checkpoint").touch()
    code, out, _ = run("--seeds", "0", "1")
    assert code == 0
    assert "2_sft: was interrupted" in out
    assert times("runs/r/seed0")["1_pretrain"] == 1 and "3_reward" in times("runs/r/seed1")
