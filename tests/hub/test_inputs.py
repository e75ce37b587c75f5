"""Models, data and recipe folders that are read from the Hub."""

import io
import json
import os
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import constants

from pipeline.__main__ import main
from pipeline.config.recipe_folder import fetch_recipes
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
from tests.hub.conftest import use

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
    fetch_recipes.cache_clear()


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


def plan(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, str, str]:
    """Print the plan of a run, and return exit code, stdout and stderr."""
    fetch_recipes.cache_clear()
    try:
        code = main(["run", name, "--dry-run"])
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *capsys.readouterr())


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_recipe_folder_of_the_hub_is_shown_and_run(
    hub: Hub,
    base: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    add_gsm8k(hub)
    module = b"raise SystemExit('code of the Hub has run')\n"
    hub.add("alice/recipes", {"2_sft.yaml": SFT, "my_rewards.py": module, "a.safetensors": b"x"}, kind)
    code, out, err = plan(capsys, "alice/recipes@main")
    assert (code, err) == (0, "")
    assert "dataset_name: alice/gsm8k@v1\n" in out and "run 2_sft: has not run yet" in out
    fetched = [r.path.rsplit("/", 1)[1] for r in hub.requests if "/resolve/" in r.path]
    assert set(fetched) <= {"2_sft.yaml"} and fetched

    local = tmp_path / "alice" / "recipes"
    local.mkdir(parents=True)
    (local / "2_sft.yaml").write_bytes(SFT.replace(b"runs/hub", b"runs/local"))
    hub.requests.clear()
    assert "runs/local" in plan(capsys, "alice/recipes")[1], "a local folder of that name wins"
    assert not [r for r in hub.requests if "alice/recipes" in r.path]


def test_what_a_recipe_of_the_hub_may_not_do(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("raise SystemExit('it was run')")
    grpo = SFT + b"reward_funcs: [my_rewards:mine]\nenv: {HF_ENDPOINT: http://elsewhere}\n"
    hub.add("alice/recipes", {"4_grpo.yaml": grpo, "my_rewards.py": b"def mine(completions): return [1.0]"})
    code, out, err = plan(capsys, "alice/recipes")
    assert code == 2 and out == ""
    assert "4_grpo.yaml: env: HF_ENDPOINT" in err
    assert "4_grpo.yaml: reward_funcs: my_rewards:mine: code from the Hub" in err


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


def test_the_launch_file_of_a_recipe_of_the_hub_is_never_taken(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = b"distributed_type: MULTI_GPU\nnum_machines: 2\nmain_process_ip: 10.1.2.3\n"
    hub.add("alice/recipes", {"2_sft.yaml": SFT, "accelerate_config.yaml": evil, "sub/2_other.txt": b""})
    code, out, err = plan(capsys, "alice/recipes")
    assert (code, err) == (0, "") and "10.1.2.3" not in out and "accelerate_config.yaml -m" in out
    folder = fetch_recipes("alice/recipes")
    assert folder is not None and [path.name for path in folder.iterdir()] == ["2_sft.yaml"]
    # Another tool may have downloaded this file.
    (folder / "accelerate_config.yaml").write_bytes(evil)
    code, out, err = plan(capsys, "alice/recipes")
    assert (code, err) == (0, "") and str(folder / "accelerate_config.yaml") not in out


def test_a_recipe_of_the_hub_writes_only_to_a_run_of_its_own(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("alice/recipes", {"2_sft.yaml": SFT})
    Path("runs/hub/data").mkdir(parents=True)
    code, _, err = plan(capsys, "alice/recipes")
    assert code == 2 and err.startswith("output_dir: runs/hub: is not a run of alice/recipes")
    for recipe, allowed in (("recipes/pocket", False), ("alice/recipes@v1", True)):
        Path("runs/hub/run.json").write_text(json.dumps({"recipe": recipe}))
        assert plan(capsys, "alice/recipes")[0] == (0 if allowed else 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alice/nothing", "does not exist"),
        ("alice/recipes@v9", "has no revision v9"),
        ("alice/empty", "does not contain files"),
    ],
)
def test_a_recipe_folder_that_is_not_there_is_refused_in_one_line(
    hub: Hub, capsys: pytest.CaptureFixture[str], name: str, says: str
) -> None:
    hub.add("alice/recipes", {"2_sft.yaml": SFT})
    hub.add("alice/empty", {"config.json": b"{}"})
    code, _, err = plan(capsys, name)
    assert code == 2 and says in err and len(err.splitlines()) == 1


def test_a_hub_that_does_not_answer_is_told_at_once_and_the_cache_still_serves(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("alice/recipes", {"2_sft.yaml": SFT})
    hub.fail("drop", times=100)
    code, _, err = plan(capsys, "alice/recipes")
    assert code == 2 and len(err.splitlines()) == 1 and "cannot be downloaded" in err and len(hub.requests) == 1
    hub.faults.clear()
    fetch_recipes.cache_clear()
    assert fetch_recipes("alice/recipes") is not None
    fetch_recipes.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_recipes("alice/recipes") is not None


def test_a_private_recipe_folder_needs_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("alice/recipes", {"2_sft.yaml": SFT}, private=True)
    assert plan(capsys, "alice/recipes")[0] != 2 or "does not exist" not in capsys.readouterr().err
    use(hub, monkeypatch, tmp_path / "other", None)
    assert plan(capsys, "alice/recipes")[0] == 2
    assert os.environ["HF_TOKEN"] == ""
