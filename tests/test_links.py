"""Commands that write into a run do not leave it by the links that a stranger may have put there."""

import importlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipeline.__main__ import main
from pipeline.data.votes import update_data_set
from pipeline.errors import UserError
from pipeline.preferences.people import load_votes
from pipeline.training.entry import run as run_recipe
from pipeline.training.reliable import STATE
from tests.helpers.fake_run import UNTIL_SFT, write_run
from tests.helpers.files import link, write_rows
from tests.helpers.refusals import refused
from tests.helpers.small_model import recipe_command, save_model, save_tokenizer, write_conversations

VOTE = {
    "id": "1", "pair": "1", "annotator": "ann", "prompt": [{"role": "user", "content": "Who?"}], "a": "I.", "b": "You.",
    "model_a": "2_sft", "model_b": "2_sft", "choice": "a",
}  # fmt: skip

VOTES = [
    "votes", "votes/.votes.lock", "votes/votes.jsonl", "votes/pairs.jsonl", "votes/.data.lock", "votes/README.md",
    "votes/.README.md.tmp", "votes/train.parquet", "votes/.train.tmp", "votes/judgements", "votes/judgements/.test.tmp",
]  # fmt: skip
STAGE = [
    "2_sft", "2_sft/.lock", "2_sft/arguments.json", "2_sft/.arguments.json.tmp", "2_sft/config.json",
    "2_sft/model.safetensors", "2_sft/trainer_state.json", "2_sft/README.md", "2_sft/tokenizer.json",
    "2_sft/.unfinished", "2_sft/checkpoint-2", "2_sft/checkpoint-2/.trainer_state.json", "2_sft/.checkpoint-2.trash",
    "2_sft/.pushed-checkpoint-2", "2_sft/base", "2_sft/.base.tmp", "2_sft/runs", "2_sft/completions",
]  # fmt: skip
EVALUATIONS = ["evaluations", "evaluations/2_sft.json", "evaluations/2_sft.jsonl", "evaluations/.2_sft.json.tmp"]
REPORT = ["report", "report/index.html", "report/report.md", "report/metrics.json", "report/.index.html.tmp"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model and a vote, and data for more steps."""
    home = tmp_path_factory.mktemp("made")
    save_model(home / "run" / "2_sft")
    save_tokenizer(home / "run" / "2_sft")
    recipe_command("sft", home / "inputs")
    write_conversations(home / "few.jsonl", 4)
    write_rows(home / "prompts.jsonl", [{"prompt": VOTE["prompt"]}])
    (home / "run" / "run.json").write_text('{"steps": {}}')
    (home / "run" / "votes").mkdir()
    (home / "run" / "votes" / "votes.jsonl").write_text(json.dumps(VOTE) + "\n")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A downloaded run, next to a folder and a file of the user's, which must not change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "votes.jsonl").write_text(json.dumps(VOTE) + "\n{")
    (tmp_path / "victim").write_text("my profile")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    yield tmp_path
    assert contents(tmp_path) == before


def contents(home: Path) -> dict[str, bytes | None]:
    """Return the content of what must not change, by path: bytes of a file, None of a folder."""
    paths = [home / "victim", home / "missing", *(home / "outside").rglob("*")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths if path.exists()}


def ends_well(capsys: pytest.CaptureFixture[str], command: Callable[[], Any], name: str) -> None:
    """Run a command, which does what it should, or names the link in one line and ends with code 2."""
    capsys.readouterr()
    try:
        assert not command()
    except SystemExit as stop:
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.code == 2 and name in line and "delete it" in line


@pytest.fixture(params=["victim", "outside", "missing"])
def target(request: pytest.FixtureRequest, home: Path) -> Path:
    """Where a link leads: to a file, to a folder, or to nothing."""
    return home / str(request.param)


def visit(app: Any, **_: Any) -> None:
    """Open the page, which opens the votes and, in the end, writes their data set."""
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/").status_code == 200


@pytest.mark.parametrize("name", VOTES)
def test_app(
    name: str, target: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("krippendorff")
    monkeypatch.setattr("uvicorn.run", visit)
    link(home / "run" / name, target)
    ends_well(capsys, lambda: main(["app", "run", "--prompts", "prompts.jsonl"]), f"run/{name}")


def test_app_without_links(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("krippendorff")
    monkeypatch.setattr("uvicorn.run", visit)
    assert main(["app", "run", "--prompts", "prompts.jsonl"]) == 0
    written = {path.name for path in (home / "run" / "votes").rglob("*")}
    assert {".votes.lock", ".data.lock", "pairs.jsonl", "README.md", "judgements"} <= written


@pytest.mark.parametrize("name", VOTES[1:])
def test_the_data_set_of_votes(name: str, target: Path, home: Path) -> None:
    """Any reader of the votes, such as `evaluate`, brings their data set up to date."""
    link(home / "run" / name, target)
    with pytest.raises(UserError, match=r"is a link to .*, outside of the run; delete it"):
        update_data_set(home / "run" / "votes")


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluate(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(home / "run" / name, target)
    options = ["--stage", "2_sft", "--instructions", "few.jsonl"]
    ends_well(capsys, lambda: main(["evaluate", "run", *options]), f"run/{name}")


@pytest.mark.parametrize("name", ["evaluations", "evaluations/mine", "votes"])
def test_evaluate_by_name_and_by_votes(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(home / "run" / name, target)
    options = ["--stage", "2_sft", "--name", "mine", "--prompts", "prompts.jsonl", "--judge", "votes"]
    message = refused(capsys, "evaluate", "run", *options)
    assert f"RUN: run/{name}: is a link to {target}, outside of the run" in message


def test_pairs_that_people_judge_by_hand(target: Path, home: Path) -> None:
    path = home / "run" / "votes" / "2_sft.jsonl"
    link(path.with_name(".2_sft.jsonl.tmp"), target)
    load_votes(path).match(["a"], ["b"], [{"prompt": VOTE["prompt"]}])
    assert path.is_file()


@pytest.mark.parametrize("name", REPORT)
def test_report(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(home / "finished", stages=UNTIL_SFT)
    link(home / "finished" / name, target)
    ends_well(capsys, lambda: main(["report", "finished"]), f"finished/{name}")


def test_report_on_seeds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of seeds may have a link to another run of the user's."""
    write_run(home / "mine", stages=UNTIL_SFT)
    link(home / "seeds" / "seed0", home / "mine")
    assert refused(capsys, "report", "seeds").startswith("RUN: seeds/seed0: is a link to")
    assert not (home / "mine" / "report").exists()


@pytest.mark.parametrize("name", STAGE)
def test_training(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(home / "run" / name, target)
    arguments = recipe_command("sft", home / "inputs", "--output_dir", "run/2_sft")[2:]
    recipe = importlib.import_module("recipes.sft")
    line = f"output_dir: run/{name}: is a link to {target}, outside of the run; delete it, or choose another directory"
    assert refused(capsys, *arguments, main=partial(run_recipe, recipe.main)) == f"{line}\n"


def test_a_stage_alone_is_not_left_either(target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run" / "run.json").unlink()
    link(home / "run" / "2_sft" / "config.json", target)
    arguments = recipe_command("pretrain", home / "inputs", "--output_dir", "run/2_sft")[2:]
    recipe = importlib.import_module("recipes.untrained")
    ends_well(capsys, partial(run_recipe, recipe.main, arguments), "run/2_sft/config.json")


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("data", ["--size_mb", "0.1"]),
        ("tokenizer", ["--dataset_name", "inputs/text.txt", "--vocab_size", "300"]),
        ("preferences", ["--model_name_or_path", "run/2_sft", "--dataset_name", "few.jsonl"]),
        ("votes", ["--model_name_or_path", "run/2_sft", "--dataset_name", "few.jsonl"]),
        ("shards", ["--dataset_name", "inputs/text.txt", "--tokenizer_name_or_path", "inputs/tokenizer"]),
    ],
)
@pytest.mark.parametrize("name", ["made", "made/inner"])
def test_data_steps(
    recipe: str, arguments: list[str], name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if recipe == "shards":
        pytest.importorskip("datatrove")
    link(home / "run" / "made", target)
    module = importlib.import_module(f"recipes.{recipe}")
    arguments = [*arguments, "--output_dir", f"run/{name}"]
    (line,) = refused(capsys, *arguments, main=partial(run_recipe, module.main)).splitlines()
    assert line.startswith(f"output_dir: run/made: is a link to {target}, outside of the run;")


@pytest.mark.parametrize("name", ["tokenizer", ".tokenizer.tmp", ".tokenizer.trash", "tokenizer/tokenizer.json"])
def test_a_folder_that_is_replaced(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(home / "run" / name, target)
    arguments = ["--dataset_name", "inputs/text.txt", "--vocab_size", "300", "--output_dir", "run/tokenizer"]
    recipe = importlib.import_module("recipes.tokenizer")
    ends_well(capsys, partial(run_recipe, recipe.main, arguments), f"run/{name}")


@pytest.mark.parametrize("name", ["model.gguf", "made/model.gguf"])
def test_gguf(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = "made" if "/" in name else name
    link(home / "run" / place, target)
    assert refused(capsys, "gguf", "run/2_sft", f"run/{name}").startswith(f"outfile: run/{place}: is a link")


@pytest.mark.parametrize("name", ["merged", ".merged.tmp", ".merged.trash", "made"])
def test_merge(name: str, target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("run/2_sft"), LoraConfig(r=1, task_type="CAUSAL_LM"))
    model.save_pretrained("run/3_dpo")
    save_tokenizer(home / "run" / "3_dpo")
    link(home / "run" / name, target)
    output = "run/made/merged" if name == "made" else "run/merged"
    ends_well(capsys, lambda: main(["merge", "run/3_dpo", "--output_dir", output]), f"run/{name}")


def test_a_file_of_differences_replaces_a_link(target: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`compare --output` names a link of the user's own."""
    for run in ("finished", "other"):
        write_run(home / run, stages=UNTIL_SFT)
    link(home / "differences.json", target)
    command = ["compare", "finished", "--against", "other", "--output", "differences.json"]
    if target.is_dir():
        assert refused(capsys, *command).endswith("is a directory; name a file in it\n")
        return
    assert main(command) == 0
    assert "2_sft" in json.loads((home / "differences.json").read_text())


def test_the_state_in_a_named_checkpoint(target: Path, home: Path) -> None:
    """`--resume_from_checkpoint` may name a folder of a stranger, and a resumed run updates its state."""
    from transformers import TrainerState

    from pipeline.training.checkpoint_folders import replace_state, save_state, write_manifest

    checkpoint = home / "run" / "2_sft"
    save_state(TrainerState(global_step=2), checkpoint / STATE)
    write_manifest(checkpoint, 2, False, 1.0)
    for name in (STATE, f".{STATE}"):
        link(checkpoint / f".{STATE}", target)
        replace_state(checkpoint, TrainerState(global_step=2))
        link(checkpoint / name, target)
        save_state(TrainerState(global_step=2), checkpoint / name)
