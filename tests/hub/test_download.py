"""`run --download`: what a recipe names on the Hub is in the cache afterwards, for machines without internet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants, snapshot_download
from small_model import conversation, save_model

from pipeline.__main__ import main
from pipeline.training.download import FILES
from tests.hub.hub_server import Hub


def test_models_and_data_are_fetched_and_streams_are_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(save_model(tmp_path / "model"))
    hub.add("alice/model", {file.name: file.read_bytes() for file in folder.iterdir()} | {"old.bin": b"a pickle"})
    table = io.BytesIO()
    Dataset.from_list([{"messages": conversation(f"{i}?", "Yes.")} for i in range(40)]).to_parquet(table)
    hub.add("alice/chats", {"train.parquet": table.getvalue()}, type="dataset")
    (tmp_path / "recipe").mkdir()
    values = {"dataset_name": "alice/chats", "model_name_or_path": "alice/model", "max_steps": 2, "report_to": "none"}
    for number, more in (("2_sft", {}), ("3_sft", {"dataset_name": "alice/web", "dataset_streaming": True})):
        content = values | more | {"output_dir": f"runs/r/{number}"}
        if number == "3_sft":
            content["model_name_or_path"] = "runs/r/2_sft"
        (tmp_path / f"recipe/{number}.yaml").write_text(yaml.safe_dump(content))

    assert main(["run", "recipe", "--download"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fetched the model alice/model" in lines and "fetched the data set alice/chats" in lines
    assert any(line.startswith("alice/web is a stream") for line in lines) and len(lines) == 3
    assert not Path("runs").exists(), "nothing is trained"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = Path(snapshot_download("alice/model", local_files_only=True, allow_patterns=FILES))
    assert (cached / "model.safetensors").exists() and not (cached / "old.bin").exists()
