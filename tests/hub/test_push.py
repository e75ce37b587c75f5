"""`python -m pipeline push`: a whole run goes to the Hub and comes back, whatever happens on the way."""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from pipeline.__main__ import main
from pipeline.hub.repositories import Outputs
from tests.helpers.hub_server import Hub, Token
from tests.helpers.small_model import equal, save_model, tokenizer
from tests.helpers.small_run import TOKEN, write_small_run
from tests.hub.conftest import use

REPOSITORIES = {
    *(("model", f"alice/mini-{name}") for name in ("0_random", "1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo")),
    ("dataset", "alice/mini-data"),
    ("dataset", "alice/mini-3_preferences"),
    ("space", "alice/mini-report"),
}
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")

FAULTS = {
    "400": (400, "POST /api/validate-yaml"),
    "401": (401, "POST .*2_sft/preupload"),
    "403": (403, "POST .*data/commit"),
    "404": (404, "POST .*/models/alice/mini-2_sft/preupload"),
    "404 that does not say of what": (404, "GET .*/models/alice/mini-2_sft$"),
    "404 of a creation": (404, "POST /api/repos/create"),
    "404 of a collection": (404, "POST /api/collections"),
    "409": (409, "POST .*2_sft/commit"),
    "429": (429, "POST /api/validate-yaml"),
    "500": (500, "POST .*lfs/objects/batch"),
    "500 of collections": (500, "POST /api/collections"),
    "dropped in an upload": ("drop", "PUT "),
    "dropped in a commit": ("drop", "POST .*3_ppo/commit"),
    "answer to a commit lost": ("lost", "POST .*3_ppo/commit"),
    "answer to a creation lost": ("lost", "POST /api/repos/create"),
    "answer to a collection's item lost": ("lost", "POST .*/items"),
}
ENDS = ("400", "401", "403", "404 of a creation", "404 of a collection")
"""Faults that end a push; after the others, the request is made again."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "mini")


def push(run: Path, *more: str) -> int:
    """Push a run in this process, and return the exit code."""
    try:
        return main(["push", str(run), *(more if "--repo_id" in more else ("--namespace", "alice", *more))])
    except SystemExit as end:
        return int(end.code or 0)


def contents(hub: Hub) -> dict[tuple[str, str], Mapping[str, bytes]]:
    return {(kind, name): hub.files(name, kind) for kind, name in hub.repos}


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    return equal(first.state_dict(), second.state_dict())


def test_what_is_pushed_comes_back_and_nothing_is_pushed_twice(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local_files = snapshot(run)
    assert push(run) == 0
    assert snapshot(run) == local_files, "nothing local has changed"
    assert set(hub.repos) == REPOSITORIES
    assert all(hub.commits(name, kind) == ["Push with Fourstage"] for kind, name in REPOSITORIES)
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}
    (collection,) = hub.collections.values()
    assert {(item["type"], item["id"]) for item in collection["items"]} == REPOSITORIES
    assert collection["title"] == "mini"

    for stage in ("0_random", "1_pretrain", "2_sft", "3_ppo"):
        name, local = f"alice/mini-{stage}", AutoModelForCausalLM.from_pretrained(run / stage)
        loaded, words = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        assert same_weights(loaded, local)
        prompt = words.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=True)
        answers = [model.generate(**prompt, max_new_tokens=5, do_sample=False) for model in (loaded, local)]
        assert torch.equal(*answers)
    reward = AutoModelForSequenceClassification.from_pretrained("alice/mini-3_reward")
    assert same_weights(reward, AutoModelForSequenceClassification.from_pretrained(run / "3_reward"))
    critic = AutoModelForTokenClassification.from_pretrained("alice/mini-3_ppo", subfolder="value_model")
    assert same_weights(critic, AutoModelForTokenClassification.from_pretrained(run / "3_ppo" / "value_model"))
    adapted = AutoPeftModelForCausalLM.from_pretrained("alice/mini-4_grpo")
    assert adapted.peft_config["default"].base_model_name_or_path == "alice/mini-3_ppo"
    assert same_weights(adapted, AutoPeftModelForCausalLM.from_pretrained(run / "4_grpo"))
    assert AutoTokenizer.from_pretrained("alice/mini-4_grpo").get_vocab() == tokenizer().get_vocab()
    rows = load_dataset("alice/mini-data", "sft", split="test", streaming=True)
    assert next(iter(rows))["messages"][1]["content"] == "It is 0."

    hub.requests.clear()
    capsys.readouterr()
    assert push(run) == 0
    sent = [request.path for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]
    assert not sent, "a second push uploads nothing"
    assert capsys.readouterr().out.count("up to date") == len(REPOSITORIES)


def test_no_file_names_the_machine_or_a_token_and_none_is_a_pickle(hub: Hub, run: Path) -> None:
    assert push(run, "--checkpoints") == 0
    branches = [(kind, name, branch) for (kind, name), repo in hub.repos.items() for branch in repo.branches]
    assert ("model", "alice/mini-2_sft", "step-2") in branches
    secrets = [str(run.parent), str(Path.cwd()), str(Path.home()), TOKEN]
    # A short name may occur in any text.
    if len(socket.gethostname()) >= 5:
        secrets.append(socket.gethostname())
    for kind, name, branch in branches:
        for path, content in hub.files(name, kind, branch).items():
            assert [text for text in secrets if text.encode() in content] == [], (name, path)
            assert not content.startswith(PICKLES), (name, path)
            hidden = any(part.startswith((".", "checkpoint-", "events")) for part in path.split("/"))
            assert not hidden and not path.endswith((".bin", ".pt", ".pth")), (name, path)


@pytest.fixture(scope="module")
def expected(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Mapping[str, bytes]]:
    """What the repositories hold after an undisturbed push of three stages and the report."""
    server = Hub()
    with pytest.MonkeyPatch.context() as patch:
        use(server, patch, tmp_path_factory.mktemp("cache"))
        assert push(run) == 0
    server.close()
    return contents(server)


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_same_command_goes_on(
    hub: Hub,
    run: Path,
    expected: Mapping[tuple[str, str], Mapping[str, bytes]],
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local_files = snapshot(run)
    kind, path = FAULTS[fault]
    hub.fail(kind, path, headers={"Retry-After": "1"} if kind == 429 else {})
    code = push(run)
    lines = capsys.readouterr().err.splitlines()
    assert hub.faults[0].seen, "the fault was met"
    assert (code, len(lines)) == ((3, 2) if fault in ENDS else (0, len(lines))), lines
    assert len(lines) <= 2 and all(len(line) < 300 for line in lines), lines
    assert code == 3 or (contents(hub) == expected and len(hub.collections) == 1)
    assert push(run) == 0
    assert contents(hub) == expected, "all is there"
    for kind_of, name in REPOSITORIES:
        assert len(hub.commits(name, kind_of)) == 1, name
    assert len(hub.collections) == 1
    assert snapshot(run) == local_files


def test_a_push_of_a_stage_removes_its_old_files(hub: Hub, run: Path) -> None:
    """Checkpoints stay, and the other stages of the run are not pushed."""
    hub.add("alice/mini-2_sft", {"old.safetensors": b"x", "last-checkpoint/optimizer.pt": b"y"})
    assert push(run, "--stage", "2_sft") == 0
    assert set(hub.repos) == {("model", "alice/mini-2_sft")}
    files = hub.files("alice/mini-2_sft")
    assert "old.safetensors" not in files and "last-checkpoint/optimizer.pt" in files
    assert b"base_model" not in files["README.md"].split(b"---")[1], "1_pretrain is not on the Hub"


def test_a_private_repository_a_branch_and_a_licence(hub: Hub, run: Path) -> None:
    assert push(run, "--stage", "1_pretrain", "--private", "--revision", "dev", "--license", "mit") == 0
    assert hub.repos["model", "alice/mini-1_pretrain"].private
    assert not hub.files("alice/mini-1_pretrain")
    assert b"license: mit" in hub.files("alice/mini-1_pretrain", revision="dev")["README.md"]


def test_data_that_may_not_be_published_stay_here(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mini"
    shutil.copytree(run, copy)
    card = copy / "data" / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("---\n", "---\npublish: false\n", 1), encoding="utf-8")
    assert push(copy) == 0
    assert "`publish: false`: 3_preferences, data" in capsys.readouterr().err
    assert set(hub.repos) == {(kind, name) for kind, name in REPOSITORIES if kind != "dataset"}
    for kind, name in hub.repos:
        assert b"alice/mini-data" not in hub.files(name, kind)["README.md"]
    for arguments in (("--stage", "3_preferences"), ("--stage", "data", "--private")):
        assert push(copy, *arguments) == 2
    assert push(copy / "3_preferences", "--repo_id", "alice/pairs") == 2
    assert "a card of the run's data says `publish: false`" in capsys.readouterr().err
    assert not any(kind == "dataset" for kind, _ in hub.repos)


def test_a_pull_request_leaves_main_as_it_is(hub: Hub, run: Path) -> None:
    assert push(run, "--stage", "1_pretrain", "--create-pr") == 0
    assert b"license: apache-2.0" in hub.files("alice/mini-1_pretrain", revision="refs/pr/1")["README.md"]
    assert not hub.files("alice/mini-1_pretrain")


def test_a_dry_run_lists_the_files_without_a_request(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(run, "--dry-run", "--checkpoints") == 0
    out = capsys.readouterr().out
    assert "space alice/mini-report" in out and "(branch step-2)" in out and "nothing was pushed" in out
    assert "value_model/model.safetensors" in out and "training_args.bin" not in out
    assert not hub.requests


def test_one_output_directory(hub: Hub, run: Path) -> None:
    assert push(run / "2_sft", "--repo_id", "alice/own") == 0
    assert same_weights(*map(AutoModelForCausalLM.from_pretrained, ("alice/own", str(run / "2_sft"))))
    assert b'model="alice/own"' in hub.files("alice/own")["README.md"]
    assert push(run / "data", "--repo_id", "alice/rows") == 0
    assert load_dataset("alice/rows", split="train").num_rows == 8


def test_an_adapter_whose_base_was_merged_from_another_loads_from_the_hub(hub: Hub, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "3_ppo"
    save_model(folder / "base", seed=5)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder)
    assert push(folder, "--repo_id", "alice/lora") == 0
    assert set(hub.repos) == {("model", "alice/lora"), ("model", "alice/lora-base")}
    assert not [path for path in hub.files("alice/lora") if path.startswith("base/")]
    loaded = AutoPeftModelForCausalLM.from_pretrained("alice/lora")
    assert loaded.peft_config["default"].base_model_name_or_path == "alice/lora-base"
    assert same_weights(loaded, AutoPeftModelForCausalLM.from_pretrained(folder))
    assert b"alice/lora" in hub.files("alice/lora-base")["README.md"]


def test_the_base_in_the_cache_of_the_client_is_named_by_its_id(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run / "4_grpo", tmp_path / "4_grpo")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/alice/.cache/huggingface/hub/models--acme--big/snapshots/0123abc"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (item,) = Outputs(tmp_path, repo_id="alice/lora", only=["4_grpo"]).repositories()
    written = item.files["adapter_config.json"]
    assert isinstance(written, bytes) and json.loads(written)["base_model_name_or_path"] == "acme/big"


@pytest.mark.parametrize("name", ["my run", "my - run", "größe -x", "a..b", ".hidden-", "x" * 120, "ü"])
def test_the_names_of_repositories_are_those_that_the_hub_takes(name: str, tmp_path: Path) -> None:
    run = Outputs(tmp_path / name, namespace="alice")
    ids = {run.id_of(stage) for stage in ("2_sft", "3_reward", "3_ppo", "report")}
    assert len(ids) == 4
    for repo_id in ids:
        validate_repo_id(repo_id)


@pytest.mark.parametrize(
    ("tokens", "token", "more", "says"),
    [
        ({}, None, (), "needs a token"),
        ({"hf_old": Token("alice", expired=True)}, "hf_old", (), "expired"),
        ({"hf_read": Token("alice", write=False)}, "hf_read", (), "only read"),
        ({"hf_one": Token("alice", write=("alice/mini-2_sft",))}, "hf_one", (), "alice/mini-2_sft only"),
        ({"hf_bob": Token("bob")}, "hf_bob", (), "belongs to alice"),
        ({"hf_alice": Token("alice")}, "hf_alice", ("--stage", "5_more"), "5_more: is not a finished"),
        ({"hf_alice": Token("alice")}, "hf_alice", ("--create-pr", "--revision", "dev"), "omit --revision"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokens: Mapping[str, Token],
    token: str | None,
    more: tuple[str, ...],
    says: str,
) -> None:
    server = Hub(tokens)
    use(server, monkeypatch, tmp_path / "cache", token)
    assert push(run, *more) == 2
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[0] and len(lines) == 1, lines
    assert not server.repos
    server.close()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("run.json", "[" * 100_000, "cannot be read"),
        ("run.json", '{"steps": {"2_sft": null}}', "is not the record of a run; remove it"),
        ("run.json", '{"steps": {"2_sft": {"values": "text"}}}', "is not the record of a run; remove it"),
        ("run.json", None, "is not a file"),
        ("data/README.md", "---\nconfigs: [a: b: c\n---\n", "cannot be read as a data card"),
    ],
)
def test_a_damaged_file_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, says: str
) -> None:
    shutil.copytree(run, tmp_path / "mini")
    path = tmp_path / "mini" / name
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    assert push(tmp_path / "mini", "--dry-run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"RUN: {path}: ") and says in line


def test_a_token_for_one_repository_pushes_to_that(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Hub({"hf_one": Token("alice", write=("alice/mini-2_sft",))})
    server.add("alice/mini-2_sft", {})
    use(server, monkeypatch, tmp_path / "cache", "hf_one")
    assert push(run, "--stage", "2_sft") == 0
    assert capsys.readouterr().err == (
        "The token may not write to collections, so the repositories are not tied together.\n"
    )
    assert "model.safetensors" in server.files("alice/mini-2_sft")
    server.close()
