"""Models and data that are read from the Hub; recipe folders are not."""

import io
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from pipeline.__main__ import main
from pipeline.data.arguments import DataArguments
from pipeline.data.sources import open_source
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from pipeline.models import loading
from pipeline.models.loading import load_model, local_copy
from pipeline.training.entry import run
from recipes import sft
from tests.helpers.hub_server import Hub
from tests.helpers.refusals import refused
from tests.helpers.small_model import save_model, save_tokenizer

SFT = b"""\
model_name_or_path: alice/base@v1
dataset_name: alice/gsm8k@v1
dataset_config: main
prompt_column: question
completion_column: answer
dataset_streaming: true
max_length: 128
max_steps: 1
per_device_train_batch_size: 2
output_dir: runs/hub/2_sft
report_to: none
"""


@pytest.fixture(autouse=True)
def forget() -> None:
    loading._download.cache_clear()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder)
    save_tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def add_gsm8k(hub: Hub, private: bool = False) -> None:
    """A data set in the layout of openai/gsm8k."""
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    files = {}
    for split, number in (("train", 40), ("test", 8)):
        rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(number)]
        buffer = io.BytesIO()
        Dataset.from_list(rows).to_parquet(buffer)
        files[f"main/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        card += f"  - split: {split}\n    path: main/{split}-*\n"
    hub.add("alice/gsm8k", {**files, "README.md": f"{card}---\n".encode()}, type="dataset", private=private)
    repo = hub.repos["dataset", "alice/gsm8k"]
    repo.tags["v1"] = repo.branches["main"]


def add_base(hub: Hub, base: dict[str, bytes], name: str = "alice/base") -> None:
    hub.add(name, base)
    repo = hub.repos["model", name]
    repo.branches["v1"] = repo.branches["main"]
    hub.add(name, {"model.safetensors": b"not a model"})


def test_data_are_streamed_into_a_recipe_that_starts_from_a_revision(
    hub: Hub, base: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    add_base(hub, base)
    add_gsm8k(hub, private=True)
    Path("2_sft.yaml").write_bytes(SFT)
    run(sft.main, ["--config", "2_sft.yaml"])
    assert Path("runs/hub/2_sft/model.safetensors").stat().st_size == len(base["model.safetensors"])
    card = Path("runs/hub/2_sft/README.md").read_text()
    assert "alice/base" in card and "datasets:" in card


def test_rows_are_the_same_streamed_or_not_and_a_revision_is_one(hub: Hub) -> None:
    add_gsm8k(hub)
    hub.add("alice/gsm8k", {"main/train-00000-of-00001.parquet": b"broken since"}, type="dataset")
    columns = {"prompt_column": "question", "completion_column": "answer"}
    rows = {}
    for streaming in (False, True):
        args = DataArguments("alice/gsm8k@v1", "main", dataset_streaming=streaming, **columns)
        train, _ = load_splits(args, "conversation", evaluation=False)
        assert isinstance(train, IterableDataset if streaming else Dataset)
        # Streams are shuffled.
        rows[streaming] = sorted(map(str, train))
    assert rows[True] == rows[False] and len(rows[True]) == 40
    with pytest.raises(UserError, match="revision v2"):
        open_source("alice/gsm8k@v2", "main")


def test_a_model_of_a_revision_loads_and_a_critic_lies_in_its_folder(hub: Hub, base: dict[str, bytes]) -> None:
    add_base(hub, base)
    model, _ = load_model("alice/base@v1", "judge", chat=False)
    assert model.num_parameters() > 0
    hub.add("alice/ppo", base | {f"value_model/{name}": content for name, content in base.items()})
    assert Path(local_copy("alice/ppo", "value_model")).name == "value_model"
    assert local_copy("alice/base") == "alice/base"
    # Paths, which the Hub is not asked for.
    for path in ("./alice/base@v1", "runs/base", "runs/base/2_sft"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            local_copy(path)
    with pytest.raises(UserError, match=r"^judge: alice/base@v2: [^\n]*$"):
        load_model("alice/base@v2", "judge")


def test_two_different_revisions_are_refused(
    hub: Hub, base: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_base(hub, base)
    add_gsm8k(hub)
    (tmp_path / "2_sft.yaml").write_bytes(SFT)
    arguments = ["--config", tmp_path / "2_sft.yaml", "--model_revision", "v2"]
    message = refused(capsys, *arguments, main=partial(run, sft.main))
    assert "model_revision: v2: model_name_or_path asks for v1; omit one of them" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_the_card_of_a_data_set_of_the_hub_names_no_file_of_this_machine(
    hub: Hub, tmp_path: Path, streaming: bool
) -> None:
    """`datasets` reads it, so that a recipe could train on any file, and push what it learned."""
    private = tmp_path / "private.jsonl"
    private.write_text('{"prompt": "What is 12?", "answer": "12"}\n')
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {private}\n---\n"
    hub.add("alice/data", {"README.md": card.encode(), "a.jsonl": private.read_bytes()}, "dataset")
    with pytest.raises(UserError, match=f"alice/data: its README.md names {private}"):
        open_source("alice/data", streaming=streaming)


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("alice/recipes", "`hf download alice/recipes --local-dir alice/recipes`"),
        ("alice/recipes@v1", "`hf download alice/recipes --local-dir alice/recipes --revision v1`"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_recipe_of_the_hub_has_to_be_downloaded_first(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    download: str,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("alice/recipes", {"2_sft.yaml": SFT})
    with pytest.raises(SystemExit) as end:
        main([command, name])
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("reading ")]
    assert line.startswith(f"recipe: {name}: does not exist; give a folder") and download in line
    assert not hub.requests and not list(tmp_path.glob("runs"))
