"""What names the machine or holds a secret is not pushed."""

import html
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from datasets import Dataset

from pipeline.__main__ import main
from pipeline.hub.published_files import local_paths, publishable, to_bytes, without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("base_model:adapter:/tmp/run/2_sft", "base_model:adapter:2_sft"),
        ("--x=/tmp/run/2_sft, '/tmp/a'", "--x=2_sft, 'a'"),
        (json.dumps("failed:\n/tmp/run/2_sft\t/tmp/run/3_ppo"), json.dumps("failed:\n2_sft\t3_ppo")),
        (f"{Path.home()}/runs/x", "~/runs/x"),
        ("https://a.b/tmp/c and ./tmp/c and <b>x</tmp/c>", "https://a.b/tmp/c and ./tmp/c and <b>x</tmp/c>"),
        ("at //tmp/run/2_sft and ///tmp//a//b", "at 2_sft and b"),
        ("http://tmp/a/b, https://tmp/tmp/c", "http://tmp/a/b, https://tmp/tmp/c"),
        ("--hub_token hf_aSecret1", "--hub_token hf_***"),
        ("--hub_token hf_my-own_token", "--hub_token hf_***"),
    ],
)
def test_paths_and_tokens_are_replaced(monkeypatch: pytest.MonkeyPatch, text: str, public: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_my-own_token")
    assert without_paths(text) == public


NAMES = ["Kunde Müller", "a, b", "x: y", "run [1] (old) {2}", "日本 語", "it's", "50% & <b>", "back`tick", "#1; done"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exists", [True, False])
def test_whatever_characters_are_in_a_path_no_file_names_it(tmp_path: Path, name: str, exists: bool) -> None:
    """`exists`: whether the run still lies where it was made; what its settings name is known anyway."""
    made = tmp_path / name / "run 1" / "2_sft"
    folder = made if exists else tmp_path / "moved" / "2_sft"
    folder.mkdir(parents=True)
    command = shlex.join(["python", "-m", "recipes.sft", "--config", str(tmp_path / name / "recipe" / "2_sft.yaml")])
    settings = {"output_dir": str(made), "dataset_name": [f"{tmp_path}/{name}/data"], "model_name_or_path": "a/b"}
    (folder / "arguments.json").write_text(json.dumps(settings, ensure_ascii=exists))
    record = {"recipe": str(tmp_path / name / "recipe"), "steps": {"2_sft": {"command": command}}}
    (folder.parent / "run.json").write_text(json.dumps(record))
    lines = [f"see {made}/log.txt.", f"file://{made}", f"-o{made} --x={made}", f"'{made}'", quote(str(made)), command]
    for file in ("a.txt", "b.md", "c.html", "d.jinja"):
        (folder / file).write_text("\n".join([*lines, html.escape(str(made))]))
    (folder / "e.json").write_text(json.dumps({str(made): [*lines, {"at": f"{tmp_path}/{name}/elsewhere/f"}]}))
    record_text = without_paths(json.dumps(record), local_paths(folder.parent))
    files = publishable(folder) | {"run.json": to_bytes(record_text)}
    for file, content in files.items():
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode()
        for place in (name, json.dumps(name)[1:-1], html.escape(name), quote(name), tmp_path.name):
            assert place not in text, (file, text)
    assert json.loads(bytes(files["arguments.json"]))["output_dir"] == "2_sft"
    assert bytes(files["a.txt"]).decode().startswith("see 2_sft/log.txt.\n2_sft\n-o2_sft --x=2_sft\n'2_sft'\n2_sft\n")


def test_a_text_that_cannot_be_read_is_not_pushed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "notes.txt").write_bytes(b"\xe9t\xe9 in /tmp/a/b")
    assert publishable(tmp_path) == {}
    assert "notes.txt is not pushed: it is not UTF-8 text" in caplog.text


def test_links_that_leave_the_folder_are_not_pushed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "2_sft"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "vocab.txt").write_text("word")
    (folder / "leaves.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inner" / "leaves.json").symlink_to("../../secret.txt")
    (folder / "stays.txt").symlink_to("vocab.txt")
    (folder / "folder").symlink_to(tmp_path)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert set(publishable(folder)) == set(publishable(linked)) == {"vocab.txt", "stays.txt"}
    assert "leaves.txt is not pushed: it links to a file" in caplog.text


@pytest.mark.parametrize(
    "token",
    [
        "hf_abcdEFGH1234",
        "hf_oauth_abcdefgh",
        "hf_oauth__abcdefgh",
        "hf_jwt_eyJhbGci.eyJz_dWI-x.sig",
        "api_org_abcdefgh",
    ],
)
def test_every_kind_of_token_is_removed_from_texts(tmp_path: Path, token: str) -> None:
    for file in ("a.txt", "b.jinja", "c.json"):
        (tmp_path / file).write_text(json.dumps({"token_" + token: f"x={token}."}))
    for content in publishable(tmp_path).values():
        assert b"hf_***" in bytes(content) and token.encode() not in bytes(content)


@pytest.fixture
def push_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that pushes a run, as a dry run, and returns what was written to stderr.

    It takes options of `push`, whether the run is a miniature, and the data that `2_sft` was measured on.
    """
    monkeypatch.chdir(tmp_path)
    run = Path("runs/mine")
    (run / "report").mkdir(parents=True)
    (run / "report" / "index.html").touch()
    (run / "data").mkdir()
    (run / "data" / "README.md").touch()
    Dataset.from_dict({"text": ["a"]}).to_parquet(run / "data" / "train.parquet")
    Path("customers.csv").touch()

    def push(*options: str, smoke: bool = False, problems: str | None = None) -> str:
        settings: dict[str, Any] = {"home": str(run), "text": {"dataset_name": str(run / "data")}, "pairs": None}
        settings["prompts"] = {"dataset_name": ["openai/gsm8k"]}
        if problems:
            settings["problems"] = {"dataset_name": problems}
        record = {"smoke": smoke, "steps": {"evaluate_2_sft": {"id": "1", "values": settings}}}
        (run / "run.json").write_text(json.dumps(record))
        capsys.readouterr()
        assert main(["push", str(run), "--namespace", "alice", "--dry-run", *options]) == 0
        return capsys.readouterr().err

    return push


def test_a_push_of_a_miniature_says_so(push_warnings: Callable[..., str]) -> None:
    assert push_warnings(smoke=True) == "runs/mine: smoke: two steps of each stage; the figures mean nothing\n"


def test_a_push_says_that_the_report_shows_rows_of_own_data(push_warnings: Callable[..., str]) -> None:
    message = "the report shows answers to held-out prompts of customers.csv, in a Space that everybody can read"
    assert push_warnings(problems="customers.csv") == f"{message}; --private hides it\n"
    assert push_warnings("--private", problems="customers.csv") == ""


def test_a_push_of_a_finished_run_on_public_data_has_nothing_to_say(push_warnings: Callable[..., str]) -> None:
    assert push_warnings() == ""


def test_a_push_says_whose_names_are_in_the_votes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    votes = tmp_path / "run" / "votes"
    votes.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    (votes / "README.md").write_text("# Votes\n")
    (votes / "votes.jsonl").write_text("")
    Dataset.from_dict({"annotator": ["ann", "bob", "ann"]}).to_parquet(votes / "train.parquet")
    capsys.readouterr()
    assert main(["push", str(tmp_path / "run"), "--namespace", "alice", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "votes.jsonl" not in out and "train.parquet" in out
    assert err == "alice/run-votes contains the names that people voted under: ann, bob\n"
