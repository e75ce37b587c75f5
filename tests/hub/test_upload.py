"""One repository of three files, with each fault at each request in turn."""

import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, snapshot_download

from pipeline.hub import upload
from pipeline.hub.upload import PUSH_ERRORS, explain, push
from tests.helpers.hub_server import HANGS, Hub

FILES: dict[str, bytes] = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "model.safetensors": bytes(range(256)) * 16,
    "value_model/model.safetensors": bytes(range(255, -1, -1)) * 16,
}
FAULTS: dict[str, dict[str, Any]] = {
    "401": {"kind": 401},
    "403": {"kind": 403},
    "404": {"kind": 404},
    "409": {"kind": 409},
    "429": {"kind": 429, "headers": {"Retry-After": "7"}},
    "500": {"kind": 500},
    "502 of a proxy": {"kind": 502, "headers": {"Content-Type": "text/html"}, "body": b"<html>Bad gateway</html>"},
    "dropped": {"kind": "drop"},
    "answer lost": {"kind": "lost"},
}
REFUSED = ("401", "403", "404")
"""Faults after which the same request is not made again."""


def write_files(folder: Path) -> dict[str, Path | bytes]:
    """Write the files, and return them as a push takes them, one of them by its content."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: folder / name if name != "README.md" else content for name, content in FILES.items()}


@pytest.mark.parametrize("revision", [None, "dev"])
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_request_fails_each_file_is_there_once_in_the_end(
    hub: Hub, tmp_path: Path, fault: str, revision: str | None
) -> None:
    files = write_files(tmp_path)
    push(HfApi(), "alice/whole", files, "m", revision=revision)
    paths = [request.path for request in hub.requests]
    assert len(paths) > 8
    for nth, path in enumerate(paths, start=1):
        # A conflict at a creation says that the repository or the branch exists.
        if fault == "409" and (path == "/api/repos/create" or "/branch/" in path):
            continue
        name = f"alice/{fault.split()[0]}-{nth}"
        hub.requests.clear()
        hub.blobs.clear()
        hub.faults.clear()
        hub.fail(**FAULTS[fault], nth=nth)
        failure = None
        try:
            push(HfApi(), name, files, "m", revision=revision)
        except PUSH_ERRORS as error:
            failure = explain(error, name)
            push(HfApi(), name, files, "m", revision=revision)
        assert hub.faults[0].seen >= nth, "the fault was met"
        assert (failure is None) or (fault in REFUSED and "\n" not in failure and len(failure) < 300), failure
        branch = revision or "main"
        assert hub.files(name, revision=branch) == FILES
        assert hub.commits(name, revision=branch) == ["m"], "no commit twice, and none that changes nothing"
        sent = [request.path for request in hub.requests if request.method == "PUT"]
        assert len(sent) <= 3, "only the upload that failed is sent again"
        assert {request.token for request in hub.requests if request.host == "storage"} <= {None}


@pytest.mark.parametrize("request_of", ["GET .*/models/alice/m/revision/dev$", "POST .*/branch/", "POST .*/preupload/"])
def test_a_repository_that_is_not_found_at_once_is_looked_for_again(hub: Hub, tmp_path: Path, request_of: str) -> None:
    files = write_files(tmp_path)
    hub.fail(404, request_of, times=4)
    assert push(HfApi(), "alice/m", files, "m", revision="dev")
    assert hub.files("alice/m", revision="dev") == FILES and hub.commits("alice/m", revision="dev") == ["m"]
    hub.faults.clear()
    hub.fail(404, request_of, times=99)
    with pytest.raises(PUSH_ERRORS) as caught:
        push(HfApi(), "alice/m", files, "m", revision="dev")
    assert "alice/m does not exist, or the token may not see it" in explain(caught.value, "alice/m")
    assert hub.faults[0].seen == 5, "it is not looked for without end"


def test_a_second_push_sends_nothing_and_stale_files_are_removed(hub: Hub, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    assert push(HfApi(), "alice/m", files, "one") and hub.files("alice/m") == FILES
    hub.requests.clear()
    assert not push(HfApi(), "alice/m", files, "two")
    assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]
    del files["value_model/model.safetensors"]
    assert push(HfApi(), "alice/m", files, "three")
    assert "value_model/model.safetensors" not in hub.files("alice/m")
    assert hub.commits("alice/m") == ["three", "one"]


def test_equal_files_are_uploaded_once_and_large_ones_in_parts(hub: Hub, tmp_path: Path) -> None:
    hub.part = 1000
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 16)
    files: dict[str, Path | bytes] = dict.fromkeys(("a.safetensors", "b/a.safetensors"), tmp_path / "weights")
    hub.fail("drop", path="PUT .*/3$")
    push(HfApi(), "alice/m", files, "m", private=True)
    sent = [request.path[-1] for request in hub.requests if request.method == "PUT"]
    assert sent == ["1", "2", "3", "3", "4", "5"]
    loaded = Path(snapshot_download("alice/m"))
    assert (loaded / "b/a.safetensors").read_bytes() == (tmp_path / "weights").read_bytes()
    assert hub.repos["model", "alice/m"].private
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}


def test_two_who_push_at_once_do_not_undo_each_other(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_files(tmp_path)
    push(HfApi(), "alice/m", {"README.md": FILES["README.md"]}, "one")
    create_commit = HfApi.create_commit

    def slower(api: HfApi, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(HfApi, "create_commit", create_commit)
        hub.add("alice/m", {"notes.md": b"of somebody else"})
        return create_commit(api, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", slower)
    push(HfApi(), "alice/m", files, "two", replaces=lambda path: False)
    assert hub.files("alice/m") == FILES | {"notes.md": b"of somebody else"}
    assert hub.commits("alice/m") == ["two", "add", "one"]


@pytest.mark.parametrize("path", ["GET .*/models/alice/m$", "POST .*/preupload/", "PUT ", "POST .*/commit/"])
def test_a_hub_that_accepts_a_request_and_sends_nothing_is_not_waited_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(upload, "TIMEOUT", 0.3)
    hub.fail("hang", path)
    started = time.monotonic()
    push(HfApi(), "alice/m", write_files(tmp_path), "m")
    assert hub.faults[0].seen and time.monotonic() - started < HANGS - 2
    assert hub.files("alice/m") == FILES and hub.commits("alice/m") == ["m"]


def test_a_hub_that_does_not_say_what_is_missing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = hub.answer

    def without_codes(*args: Any) -> Any:
        status, headers, body = answer(*args)
        return status, {name: value for name, value in headers.items() if name != "X-Error-Code"}, body

    monkeypatch.setattr(hub, "answer", without_codes)
    push(HfApi(), "alice/m", write_files(tmp_path), "m", revision="dev")
    assert hub.files("alice/m", revision="dev") == FILES
