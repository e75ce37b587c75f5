"""`run --download`: what a recipe names on the Hub is in the cache afterwards, for machines without internet."""

import io
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants, snapshot_download

from pipeline.__main__ import main
from pipeline.data.sources import open_source
from pipeline.errors import UserError
from pipeline.hub.download import MODEL_FILES
from tests.helpers.hub_server import Hub
from tests.helpers.refusals import refused
from tests.helpers.small_model import conversation, save_model

SHARDS = [("small", "train", 0), ("small", "train", 1), ("small", "extra", 0), ("large", "train", 0)]
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: small
  data_files:
  - split: train
    path: small/train-*.parquet
  - split: extra
    path: small/extra-*.parquet
- config_name: large
  data_files:
  - split: train
    path: large/train-*.parquet
---
"""


def rows(number: int, text: str) -> bytes:
    table = io.BytesIO()
    Dataset.from_list([{"messages": conversation(f"{text}{i}?", "Yes.")} for i in range(number)]).to_parquet(table)
    return table.getvalue()


def test_models_data_and_streams_are_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(save_model(tmp_path / "model"))
    hub.add("alice/model", {file.name: file.read_bytes() for file in folder.iterdir()} | {"old.bin": b"a pickle"})
    hub.add("alice/chats", {"train.parquet": rows(40, "")}, type="dataset")
    web = {f"{name}/{split}-{i}.parquet": rows(20, f"{name} {split} {i}") for name, split, i in SHARDS}
    web["data/2024/0.parquet"] = rows(1, "all")
    hub.add("alice/web", web | {"README.md": CARD.encode()}, type="dataset")
    (tmp_path / "recipe").mkdir()
    values = {"dataset_name": "alice/chats", "model_name_or_path": "alice/model", "max_steps": 2, "report_to": "none"}
    stream = {"dataset_name": "alice/web", "dataset_config": "small", "dataset_streaming": True}
    for number, more in (("2_sft", {}), ("3_sft", stream)):
        content = values | more | {"output_dir": f"runs/r/{number}"}
        if number == "3_sft":
            content["model_name_or_path"] = "runs/r/2_sft"
        (tmp_path / f"recipe/{number}.yaml").write_text(yaml.safe_dump(content))

    assert main(["run", "recipe", "--download"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fetched the model alice/model" in lines and "fetched the data set alice/chats" in lines
    said = ["fetching the stream alice/web: 0.00 GB in 3 files", "fetched the stream alice/web"]
    assert [line for line in lines if "stream" in line] == said and len(lines) == 4
    assert not Path("runs").exists(), "nothing is trained"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = Path(snapshot_download("alice/model", local_files_only=True, allow_patterns=MODEL_FILES))
    assert (cached / "model.safetensors").exists() and not (cached / "old.bin").exists()

    made = len(hub.requests)
    splits = open_source("alice/web", "small", streaming=True)
    assert list(splits) == ["train", "extra"] and splits["train"].num_shards == 2
    texts = [row["messages"][0]["content"] for row in splits["train"]]
    assert texts == [f"small train {i}{n}?" for i in range(2) for n in range(20)]
    assert len(hub.requests) == made, "without a request"
    with pytest.raises(UserError, match="dataset_name: alice/other"):
        open_source("alice/other", streaming=True)


def test_a_stream_larger_than_the_disk_is_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("alice/web", {"train.parquet": rows(20, "")}, type="dataset")
    (tmp_path / "recipe").mkdir()
    values = {"dataset_name": "alice/web", "dataset_streaming": True, "model_name_or_path": save_model(Path("model"))}
    values |= {"max_steps": 2, "max_length": 16, "report_to": "none", "output_dir": "runs/r/2_sft"}
    (tmp_path / "recipe/2_sft.yaml").write_text(yaml.safe_dump(values))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    message = refused(capsys, "run", "recipe", "--download")
    assert "dataset_name: alice/web: takes 0.00 GB in 1 files, and 0.00 GB are free" in message
    assert not list((tmp_path / "cache").rglob("*.parquet"))
