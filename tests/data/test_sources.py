"""Sources that cannot be read; test_bad_input has damaged files."""

import io
import pickle
import tarfile
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from pipeline.data.sources import open_source
from pipeline.errors import UserError
from tests.helpers.files import write_rows


def test_an_unreachable_hub_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"dataset_name: some/data: .*the Hub cannot be reached"):
        open_source("some/data")


def test_a_cache_that_is_not_writable_is_not_reported_as_bad_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    with pytest.raises(UserError, match=r"HF_HOME: .*is not writable; set HF_HOME"):
        open_source(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]))


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl"])
def test_file_names_are_not_read_as_patterns(tmp_path: Path, name: str) -> None:
    for file in (name, "a1.jsonl", "ab.jsonl"):
        write_rows(tmp_path / file, [{"text": file}])
    assert open_source(str(tmp_path / name))["train"]["text"][:] == [name]


class Boom:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


@pytest.mark.parametrize("file", ["a.pth", "a.npy", "a.pickle", "a.cls", "a.json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_in_a_tar_is_run_and_what_cannot_be_read_is_one_line(
    tmp_path: Path, file: str, streaming: bool
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        content = pickle.dumps(Boom())
        entry = tarfile.TarInfo(file)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    try:
        next(iter(open_source(str(folder), streaming=streaming)["train"]))
    except UserError as error:
        assert str(error).startswith(f"dataset_name: {folder}: ") and "\n" not in str(error)
