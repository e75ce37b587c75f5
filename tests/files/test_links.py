"""Files are not written through links, pipes and devices of a folder that somebody else made."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.files import check_links, is_locked, lock, open_log, open_regular, write_folder, write_text


def hold_lock(path: Path) -> None:
    with lock(path):
        pass


def append(path: Path) -> None:
    open_log(path).close()


def write_log(path: Path) -> None:
    open_regular(path, "wb").close()


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("half a line")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "run.json").write_text("{}")
    return path


@pytest.mark.parametrize("opens", [hold_lock, append, write_log])
@pytest.mark.parametrize("target", ["../victim", "../missing", "..", "file", "loop"])
def test_a_lock_or_a_log_is_not_opened_through_a_link(
    opens: Callable[[Path], None], target: str, run: Path, victim: Path
) -> None:
    (run / "file").write_text("own")
    (run / "loop").symlink_to(target)
    with pytest.raises(UserError, match=r"loop: is a link, a pipe or a device, which is not written to; delete it$"):
        opens(run / "loop")
    assert victim.read_text() == "half a line" and (run / "file").read_text() == "own"
    assert sorted(os.listdir(run.parent)) == ["run", "victim"]


@pytest.mark.parametrize("opens", [hold_lock, append, write_log])
def test_a_lock_or_a_log_is_no_pipe(opens: Callable[[Path], None], run: Path) -> None:
    """Opening a pipe to write waits for its reader, and opening it to read for its writer."""
    os.mkfifo(run / "pipe")
    with pytest.raises(UserError, match="pipe: is a link, a pipe or a device"):
        opens(run / "pipe")
    assert not is_locked(run / "pipe")


@pytest.mark.parametrize("target", ["../victim", "../missing", "..", "loop", os.devnull])
def test_a_file_that_is_written_whole_replaces_a_link(target: str, run: Path, victim: Path) -> None:
    for name in ("loop", ".loop.tmp"):
        (run / name).symlink_to(target)
    write_text(run / "loop", "new")
    assert not (run / "loop").is_symlink() and (run / "loop").read_text() == "new"
    assert victim.read_text() == "half a line"


def test_only_a_link_that_the_user_names_leads_to_a_device(run: Path) -> None:
    """`compare --output /dev/stdout` names a link."""
    (run / "link").symlink_to(os.devnull)
    write_text(run / "link", "text", is_named=True)
    assert (run / "link").is_symlink()


def test_a_pipe_that_nobody_reads_is_not_waited_for(run: Path) -> None:
    os.mkfifo(run / "metrics.json")
    with pytest.raises(UserError, match=r"metrics.json: is a pipe that nobody reads; delete it$"):
        write_text(run / "metrics.json", "text")


@pytest.mark.parametrize("name", ["data", ".data.tmp", ".data.trash"])
@pytest.mark.parametrize("target", ["../outside", "../victim", "../missing"])
def test_a_folder_that_is_written_whole_replaces_a_link(name: str, target: str, run: Path, victim: Path) -> None:
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "file").write_text("kept")
    (run / name).symlink_to(target)
    for _ in range(2):
        with write_folder(run / "data") as folder:
            (folder / "file").write_text("new")
    assert (run / "data" / "file").read_text() == "new"
    assert sorted(os.listdir(run)) == ["data", "run.json"]
    assert (outside / "file").read_text() == "kept" and victim.read_text() == "half a line"


@pytest.mark.parametrize(
    ("links", "refused"),
    [
        ({"votes": "../outside"}, "votes"),
        ({"votes": ".."}, "votes"),
        ({"votes": "../missing"}, "votes"),
        ({"votes/a": "../../victim"}, "votes/a"),
        ({"votes/a/b": "/etc/passwd"}, "votes/a/b"),
        ({"votes": "other", "other/a": "../../outside"}, "votes/a"),
        ({"votes/a": "../other", "other/b": "../../victim"}, "votes/a/b"),
        ({"votes/a": "a"}, "votes/a"),
        ({"votes": "."}, ""),
        ({"votes/a": ".."}, ""),
        ({"votes": "other", "other/a": "../run.json"}, ""),
        ({"other": "../outside"}, ""),
    ],
)
def test_links_out_of_a_run_are_found(links: dict[str, str], refused: str, run: Path, victim: Path) -> None:
    (run.parent / "outside").mkdir()
    for name, target in links.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(target)
    for paths in ({"home": run}, {}):
        problems = [problem.value for problem in check_links(run / "votes", **paths)]
        assert problems == ([run / refused] if refused else [])


def test_a_run_may_be_on_another_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "link", tmp_path / "runs" / "link", Path("link"), Path("runs/run"), Path("run/../link")):
        assert check_links(place / "votes") == check_links(place / "votes", home=place) == []
    # Without a run around it, a folder is the user's own.
    (tmp_path / "folder").symlink_to(run)
    assert check_links(Path("folder"), Path("folder/missing")) == []


def test_pipes_are_found_before_they_are_written_to(run: Path) -> None:
    os.mkfifo(run / "logs")
    (problem,) = check_links(run / "logs", home=run)
    assert str(problem) == f"output_dir: {run / 'logs'}: is neither a file nor a folder; delete it"
