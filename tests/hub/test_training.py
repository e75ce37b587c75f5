"""Recipes push while they train and at their end, and resume from the Hub alone."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, load_file
from transformers import TrainingArguments

from pipeline.__main__ import main
from pipeline.training.checkpoint_folders import validate_checkpoint
from pipeline.training.checks import preflight
from pipeline.training.entry import run
from recipes import sft
from tests.helpers.hub_server import Hub, Token
from tests.helpers.small_model import ROOT, equal, recipe_command, weights
from tests.hub.conftest import use

PUSH = ("--push_to_hub", "--hub_model_id", "alice/chat")
WRITES = ("POST", "PUT", "DELETE")


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    """Command line of stage 2, for eight steps with a checkpoint after every second one."""
    return recipe_command("sft", inputs, "--output_dir", str(output), "--eval_strategy", "no", *more)


def train(inputs: Path, output: Path, *more: str) -> int:
    """Run the recipe in this process, and return its exit code."""
    try:
        run(sft.main, arguments(inputs, output, *more)[2:])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that pushes nothing."""
    output = tmp_path_factory.mktemp("whole") / "2_sft"
    assert train(inputs, output) == 0
    return output


MODEL = {
    "README.md", "arguments.json", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-8"}),
        ("end", set()),
    ],
)
def test_what_a_run_pushes(
    hub: Hub, inputs: Path, whole: Path, tmp_path: Path, strategy: str, folders: set[str]
) -> None:
    """The model goes to the top of the repository, and the checkpoints that `hub_strategy` asks for into folders."""
    output = tmp_path / "2_sft"
    more = ("--hub_strategy", strategy, "--hub_revision", "v1", "--hub_private_repo", "true", "--hub_always_push")
    assert train(inputs, output, *PUSH, *more, "--save_total_limit", "1") == 0
    files = hub.files("alice/chat", revision="v1")
    assert {path for path in files if "/" not in path} == MODEL
    assert {path.split("/")[0] for path in files if "/" in path} >= folders
    assert bool(folders) == any("/" in path for path in files), "no checkpoint is left that nobody asked for"
    assert hub.files("alice/chat") == {} and hub.repos["model", "alice/chat"].private
    commits = hub.commits("alice/chat", revision="v1")
    in_progress = [] if strategy == "end" else [f"Training in progress, step {step}" for step in (8, 6, 4, 2)]
    assert commits == ["End of training", *in_progress]

    assert files["model.safetensors"] == (whole / "model.safetensors").read_bytes(), "pushing changes no weight"
    assert (output / "model.safetensors").read_bytes() == files["model.safetensors"]
    for path, content in files.items():
        named = [str(part) for part in (tmp_path, inputs, Path.home(), ROOT) if str(part).encode() in content]
        assert not named, f"{path} names the machine"
        assert b"hf_alice" not in content, f"{path} holds a token"
        assert "/" in path or not path.endswith((".bin", ".pt", ".pth")), f"{path} is a pickle"
    assert {request.token for request in hub.requests if request.host == "storage"} == {None}
    assert not list(output.glob(".pushed*"))
    first = next(i for i, request in enumerate(hub.requests) if request.method in WRITES)
    assert [request.path for request in hub.requests[:first]] == [
        "/api/whoami-v2",
        "/api/models/alice/chat/auth-check/write",
    ], "before training, only whether the token may write is asked"


def test_a_killed_run_resumes_from_the_hub_alone(hub: Hub, inputs: Path, whole: Path, tmp_path: Path) -> None:
    """It ends with the weights of an undisturbed run, to the bit."""
    command = [sys.executable, *arguments(inputs, tmp_path / "first/2_sft", *PUSH)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **hub.environment()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as killed:
        while killed.poll() is None and not hub.repos:
            time.sleep(0.01)
        while killed.poll() is None and not any("step" in title for title in hub.commits("alice/chat")):
            time.sleep(0.001)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    pushed = json.loads(hub.files("alice/chat")["last-checkpoint/trainer_state.json"])["global_step"]
    assert pushed < 8, "killed amid training"
    output = tmp_path / "second/2_sft"
    assert train(inputs, output, *PUSH, "--resume_from_checkpoint", "alice/chat@main") == 0
    assert equal(weights(output), weights(whole))
    steps = [entry["step"] for entry in json.loads((output / "trainer_state.json").read_text())["log_history"]]
    assert sorted({*steps}) == [*range(1, 9)]
    assert equal(load(hub.files("alice/chat")["model.safetensors"]), weights(whole))


def test_the_best_checkpoint_is_pushed_and_resumed_with(hub: Hub, inputs: Path, tmp_path: Path) -> None:
    more = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "2", "--greater_is_better", "true")
    # The loss falls, so that step 2 is the best one if a greater loss is better.
    more += ("--hub_strategy", "checkpoint", "--hub_always_push")
    first = tmp_path / "first"
    assert train(inputs, first, *PUSH, *more) == 0
    files = hub.files("alice/chat")
    assert {path.split("/")[0] for path in files if "/" in path} == {"last-checkpoint", "checkpoint-2"}
    state = json.loads(files["last-checkpoint/trainer_state.json"])
    assert (state["best_model_checkpoint"], state["global_step"]) == ("checkpoint-2", 8)
    assert files["model.safetensors"] == files["checkpoint-2/model.safetensors"]
    second = tmp_path / "second"
    assert train(inputs, second, *more, "--resume_from_checkpoint", "alice/chat") == 0
    assert equal(weights(second), weights(first))
    assert validate_checkpoint(second / "checkpoint-2") is None


def test_a_push_that_fails_names_the_command_that_repeats_it(
    hub: Hub, inputs: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model is complete on the disk, so that nothing is trained again."""
    output = tmp_path / "2_sft"
    hub.fail(403, path="POST .*/commit/", times=100)
    assert train(inputs, output, *PUSH) == 3
    *_, why, how = capfd.readouterr().err.splitlines()
    assert why.startswith(f"The model is complete in {output}, but it was not pushed to alice/chat: the token may not")
    assert equal(weights(output), weights(whole)) and hub.files("alice/chat") == {}
    hub.faults.clear()
    command = shlex.split(how.removeprefix("To push it: "))
    assert command[:4] == ["python", "-m", "pipeline", "push"]
    assert main(command[3:]) == 0
    assert equal(load(hub.files("alice/chat")["model.safetensors"]), weights(whole))
    assert train(inputs, output, *PUSH) == 0, "the same command pushes as well, without training again"


def test_checkpoints_that_cannot_be_pushed_do_not_disturb_the_run(
    hub: Hub, inputs: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail(403, path="POST .*/commit/", times=2)
    assert train(inputs, tmp_path / "2_sft", *PUSH, "--hub_always_push") == 0
    assert caplog.text.count("Training continues.") == 2
    assert hub.commits("alice/chat") == ["End of training", *(f"Training in progress, step {s}" for s in (8, 6))]
    assert equal(weights(tmp_path / "2_sft"), weights(whole))


TOKENS = {
    "hf_alice": Token("alice", orgs=("acme",)),
    "hf_single": Token("alice", write=("alice/chat",)),
    "hf_reads": Token("alice", write=False),
    "hf_expired": Token("alice", expired=True),
}


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        (None, "alice/chat", "needs a token"),
        ("hf_expired", "alice/chat", "is invalid or has expired"),
        ("hf_reads", "alice/chat", "the token may only read"),
        ("hf_single", "alice/other", "the token may write to alice/chat only"),
        ("hf_alice", "bob/chat", "belongs to bob, and the token to alice; push to alice/chat"),
        ("hf_alice", "nobody/chat", "belongs to nobody"),
    ],
)
def test_who_may_not_write_is_told_why_before_training(
    monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path, token: str | None, repo: str, said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hub = Hub(TOKENS)
    hub.add("bob/chat", {"README.md": b"bob's"})
    hub.add("alice/chat", {"README.md": b"alice's"})
    use(hub, monkeypatch, tmp_path / "cache", token)
    assert train(inputs, tmp_path / "out", "--push_to_hub", "--hub_model_id", repo) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("push_to_hub: ")] == lines[-1:] and said in lines[-1]
    assert not (tmp_path / "out").exists() and not [r for r in hub.requests if r.method in WRITES]
    hub.close()


def test_a_token_for_one_repository_pushes_to_it(monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path) -> None:
    hub = Hub(TOKENS)
    hub.add("alice/chat", {"README.md": b"alice's", "notes.md": b"her own"})
    use(hub, monkeypatch, tmp_path / "cache", "hf_single")
    assert train(inputs, tmp_path / "out", *PUSH) == 0
    assert {*hub.files("alice/chat")} == {*MODEL, "notes.md"}, "files of other kinds are left alone"
    hub.close()


def test_a_run_is_pushed_to_an_organization(monkeypatch: pytest.MonkeyPatch, inputs: Path, tmp_path: Path) -> None:
    hub = Hub(TOKENS)
    use(hub, monkeypatch, tmp_path / "cache", "hf_alice")
    assert train(inputs, tmp_path / "out", "--push_to_hub", "--hub_model_id", "acme/chat") == 0
    assert {*hub.files("acme/chat")} == MODEL
    hub.close()


def test_the_token_of_a_file_is_known_before_its_step_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(TOKENS)
    use(hub, monkeypatch, tmp_path / "cache", token=None)
    options = {"push_to_hub": True, "hub_model_id": "alice/chat", "report_to": "none"}
    assert "needs a token" in str(preflight(TrainingArguments(str(tmp_path / "out"), **options)))
    assert preflight(TrainingArguments(str(tmp_path / "out"), **options, hub_token="hf_single")) == []
    hub.close()


def test_a_hub_that_cannot_be_reached_stops_a_run_that_pushes_and_no_other(
    hub: Hub, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.close()
    assert train(inputs, tmp_path / "out", *PUSH) == 2
    assert "push_to_hub: alice/chat: the Hub cannot be reached" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert train(inputs, tmp_path / "out") == 0


def spoil(files: dict[str, bytes]) -> None:
    content = bytearray(files["last-checkpoint/model.safetensors"])
    content[-1] ^= 1
    files["last-checkpoint/model.safetensors"] = bytes(content)


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        (None, "alice/nothing", "does not exist"),
        (None, "alice/chat@v9", "v9"),
        (lambda files: [files.pop(path) for path in list(files) if "/" in path], "alice/chat", "with a checkpoint"),
        (spoil, "alice/chat", "is damaged: model.safetensors has changed"),
        (lambda files: files.pop("last-checkpoint/optimizer.pt"), "alice/chat", "optimizer.pt is missing"),
    ],
)
def test_what_cannot_be_resumed_from_is_refused_and_nothing_is_written(
    hub: Hub, inputs: Path, whole: Path, tmp_path: Path, change: Any, name: str, said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    files = {f"last-checkpoint/{path.name}": path.read_bytes() for path in (whole / "checkpoint-6").iterdir()}
    files["README.md"] = b"# chat"
    if change is not None:
        change(files)
    hub.add("alice/chat", files)
    assert train(inputs, tmp_path / "out", "--resume_from_checkpoint", name) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"resume_from_checkpoint: {name}: ") and said in line
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_a_checkpoint_is_downloaded(
    hub: Hub, inputs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    names = (whole / "checkpoint-6").iterdir()
    hub.add("alice/chat", {f"last-checkpoint/{path.name}": path.read_bytes() for path in names})

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        assert train(inputs, tmp_path / "out", "--resume_from_checkpoint", "alice/chat") == 2
    assert "No space left on device" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.train.shutil.copytree", full)
        assert train(inputs, tmp_path / "out", "--resume_from_checkpoint", "alice/chat") == 1
    assert "No space left on device. Free some space." in capfd.readouterr().err.splitlines()[-1]
    assert not [*(tmp_path / "out").glob("checkpoint*")]
    hub.fail("drop", path="GET /download", times=2)
    assert train(inputs, tmp_path / "out", "--resume_from_checkpoint", "alice/chat") == 0
    assert equal(load_file(tmp_path / "out/model.safetensors"), weights(whole))
