"""The runner does not leave a run by the links that a stranger may have put there."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.files import link
from tests.runner.conftest import ALL, Runner, configure, identities, times

WRITTEN = [
    "run.json", "run.lock", "logs", "logs/2_sft.log", "logs/2_sft.progress", ".trash", "2_sft", "2_sft/ran.txt",
    "2_sft/checkpoint-2", "data", "3_reward/inner/file",
]  # fmt: skip


@pytest.fixture(params=["victim", "outside", "missing"])
def target(request: pytest.FixtureRequest, folder: Path) -> Path:
    """Where a link leads: to a file, to a folder with an earlier output, or to nothing."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "ran.txt").write_text("kept\n")
    (folder.parent / "victim").write_text("my profile")
    return folder.parent / str(request.param)


def is_untouched(home: Path) -> bool:
    outside = home / "outside"
    files = {path.name: path.read_text() for path in [home / "victim", *outside.iterdir()]}
    return files == {"victim": "my profile", "ran.txt": "kept\n"} and not (home / "missing").exists()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_run_is_not_left(name: str, force: list[str], target: Path, folder: Path, run: Runner) -> None:
    link(Path("runs/r") / name, target)
    code, _, err = run(*force)
    assert code == 2 and err.count("\n") == 1, err
    assert err.startswith(f"output_dir: runs/r/{name}: is a link to {target}, outside of the run; delete it")
    assert is_untouched(folder.parent)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_earlier_output_is_not_moved_or_deleted_through_a_link(
    force: list[str], target: Path, folder: Path, run: Runner
) -> None:
    assert run()[0] == 0
    link(Path("runs/r/2_sft"), target)
    configure(folder, "2_sft", learning_rate=0.5)
    code, _, err = run(*force)
    assert code == 2 and err.startswith(f"output_dir: runs/r/2_sft: is a link to {target}, outside of the run;")
    assert is_untouched(folder.parent)


def test_seeds_of_a_run_are_in_it(target: Path, folder: Path, run: Runner) -> None:
    link(Path("runs/r/seed1"), target)
    code, _, err = run("--seeds", "0", "1")
    assert code == 2 and err.startswith(f"output_dir: runs/r/seed1: is a link to {target}, outside of the run;")
    assert is_untouched(folder.parent)


def test_seeds_share_nothing_outside_of_a_run(folder: Path, run: Runner) -> None:
    """A hard link to the target would be a second name of the user's file, in a folder that a run writes to."""
    assert run()[0] == 0
    victim = folder.parent / "victim"
    victim.write_text("my profile")
    link(Path("runs/r/1_pretrain/extra"), victim)
    code, _, err = run("--seeds", "7", "--from", "2_sft")
    assert code == 2 and err.startswith("output_dir: runs/r/1_pretrain/extra: is a link to")
    assert victim.stat().st_nlink == 1


def test_a_run_may_be_a_link_and_have_links_inside(folder: Path, run: Runner) -> None:
    Path("disk/big").mkdir(parents=True)
    Path("runs").symlink_to("disk")
    Path("disk/r").symlink_to("big")
    Path("disk/big/logs").symlink_to(".")
    Path("disk/big/place").mkdir()
    Path("disk/big/2_sft").symlink_to("place")
    assert run()[0] == 0
    assert set(identities()) == ALL and Path("disk/big/2_sft.log").is_file() and Path("disk/big/place/ran.txt").exists()
    configure(folder, "2_sft", learning_rate=0.5)
    assert run()[0] == 0
    assert times()["2_sft"] == 1 and Path("disk/big/2_sft").is_symlink()


def test_a_finished_step_may_be_elsewhere(folder: Path, run: Runner) -> None:
    """It is only read: data, for instance, may be those of another run."""
    assert run()[0] == 0
    shutil.move("runs/r/data", "elsewhere")
    Path("runs/r/data").symlink_to(Path("elsewhere").absolute())
    configure(folder, "3_reward", learning_rate=0.5)
    assert run()[0] == 0
    assert times()["3_reward"] == 1


@pytest.mark.parametrize("name", ["run.lock", "run.json", "logs", "logs/2_sft.log", "logs/2_sft.progress", ".trash"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path, run: Runner) -> None:
    path = Path("runs/r") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    code, _, err = run()
    assert code == 2 and err.startswith(f"output_dir: {path}: is ")
