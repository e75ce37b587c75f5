"""What the files of a folder that somebody else made name is not called: functions, tools, judges, tasks, data."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from pipeline.__main__ import main
from pipeline.app.models import Models
from pipeline.app.prompts import evaluation_settings, held_out_prompts, loadable_tools
from pipeline.config.named_code import only_trusted
from pipeline.data.sources import open_source
from pipeline.errors import UserError
from pipeline.models.tokenizer import train_tokenizer
from pipeline.rewards.loading import load_reward
from tests.helpers import fresh
from tests.helpers.refusals import refused
from tests.helpers.small_model import TEXT, save_model, save_tokenizer
from tests.helpers.small_run import write_small_run

CODE = '''
from pathlib import Path
Path({marker!r}).write_text("imported")

def act(completions=None, **columns) -> list:
    """Act.

    Args:
        completions: What to judge.

    Returns:
        Rewards.
    """
    Path({marker!r}).write_text("called")
    return [1.0] * len(completions or [])

class Game:
    def reset(self, **columns) -> str:
        return ""

    def act(self, text: str) -> str:
        """Act.

        Args:
            text: Anything.

        Returns:
            Nothing.
        """
        return text
'''


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that exists once the module `stranger` was imported, which Python finds in the working directory."""
    path = tmp_path / "marker"
    (tmp_path / "stranger.py").write_text(CODE.format(marker=str(path)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("stranger", None)
    yield path
    sys.modules.pop("stranger", None)


@pytest.fixture
def downloaded(tmp_path: Path, marker: Path) -> Path:
    """A run whose files name functions wherever they can."""
    run = tmp_path / "downloaded"
    save_model(run / "4_grpo")
    save_tokenizer(run / "4_grpo")
    names = {"tools": ["stranger:act"], "environment": "stranger:Game", "reward_funcs": ["stranger:act"]}
    arguments = {**names, "output_dir": str(run / "4_grpo"), "dataset_name": str(run / "data.jsonl")}
    arguments["trainer"] = "stranger:Game"
    (run / "4_grpo" / "arguments.json").write_text(json.dumps(arguments))
    problem = {"prompt": [{"role": "user", "content": "What is 12?"}], "answer": "12"}
    (run / "data.jsonl").write_text(f"{json.dumps(problem)}\n" * 40)
    source = {"dataset_name": str(run / "data.jsonl"), "grade": "stranger:act"}
    values: dict[str, Any] = {"problems": source, "prompts": source, "judge": "stranger:act", "home": str(run)}
    values |= {"lm_eval_tasks": [str(run / "task.yaml")], "called": {"problems": names}}
    steps = {"evaluate_4_grpo": {"values": values}}
    (run / "run.json").write_text(json.dumps({"steps": steps}))
    (run / "evaluate.yaml").write_text("judge: stranger:act\n")
    return run


def test_a_chat_calls_no_tool_that_only_the_folder_names(
    downloaded: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/example\n"))
    assert main(["chat", str(downloaded / "4_grpo"), "--max_new_tokens", "4"]) == 0
    error = capsys.readouterr().err
    assert not marker.exists()
    assert "tools: stranger:act: is named by a file of this folder, not by you" in error
    assert "--trust stranger:act" in error and error.count("answers without these tools") == 1

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    trusted = ["--trust", "stranger:act", "--trust", "stranger:Game"]
    assert main(["chat", str(downloaded / "4_grpo"), "--max_new_tokens", "4", *trusted]) == 0
    assert marker.exists(), "the test's module can be imported"


STANDING_IN_THE_FOLDER = """
import io, sys
from pipeline.__main__ import command, main

sys.argv = ["fourstage", "chat", "4_grpo", "--max_new_tokens", "4"]
sys.stdin = io.StringIO("hello")
assert command() == 0
for argv in (
    ["status", "."],
    ["report", "."],
    ["evaluate", ".", "--stage", "2_sft", "--limit", "2"],
    ["merge", "4_grpo", "--output_dir", "../merged"],
    ["push", ".", "--dry-run", "--namespace", "alice"],
):
    try:
        print(argv[0], main(argv))
    except SystemExit as stop:
        print(argv[0], stop.code)
"""


def test_no_module_of_the_folder_that_one_stands_in_is_imported(tmp_path: Path) -> None:
    """Libraries try to import modules that need not exist, and Python's own may not have been imported yet."""
    run = write_small_run(tmp_path / "run")
    tried = ["bottleneck", "brotli", "cupy", "gmpy2", "numba", "numexpr", "orjson", "simplejson", "winreg", "wandb"]
    for name in (*sys.stdlib_module_names, *tried):
        (run / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})\n")
    script = tmp_path / "script.py"
    script.write_text(STANDING_IN_THE_FOLDER)
    printed = fresh.run_python(f"import runpy; runpy.run_path({str(script)!r})", run, "-P")
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()
    # The others end with a message, because the run is made up.
    for name in ("report", "merge", "push"):
        assert f"{name} 0\n" in printed


def test_a_downloaded_tool_of_an_installed_package_is_not_called(downloaded: Path) -> None:
    """`torch.hub` fits the form of a tool: with it, the model wrote a file wherever it liked."""
    arguments = {"tools": ["torch.hub:download_url_to_file"], "output_dir": "x", "dataset_name": "data.jsonl"}
    (downloaded / "4_grpo" / "arguments.json").write_text(json.dumps(arguments))
    (downloaded / "run.json").unlink()
    with only_trusted([]):
        assert loadable_tools(downloaded) == {}
        with pytest.raises(UserError, match=r"--trust torch\.hub:download_url_to_file"):
            load_reward("torch.hub:download_url_to_file", "tools")


def test_built_in_names_need_no_trust(downloaded: Path) -> None:
    names = {"tools": ["calculator"], "output_dir": str(downloaded / "4_grpo"), "dataset_name": "data.jsonl"}
    (downloaded / "4_grpo" / "arguments.json").write_text(json.dumps(names))
    (downloaded / "run.json").unlink()
    with only_trusted([]):
        assert loadable_tools(downloaded) == {"problems": {"tools": ["calculator"]}}
        assert load_reward("math_answer", "reward_funcs")
        assert load_reward("hidden_taste", "reward_funcs"), "content of `recipes/` is built in as well"


@pytest.mark.parametrize("command", [["status"], ["report"], ["compare"], ["push", "--dry-run", "--repo_id", "a/b"]])
def test_other_commands_import_nothing(
    command: list[str], downloaded: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    paths = [str(downloaded)] * (2 if name == "compare" else 1)
    try:
        main([name, *paths, *options])
    except SystemExit as stop:
        assert stop.code == 2
    assert not marker.exists()


@pytest.mark.parametrize("without", [(), ("lm_eval_tasks",), ("lm_eval_tasks", "judge")])
def test_an_evaluation_calls_nothing_that_only_the_folder_names(
    without: tuple[str, ...], downloaded: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((downloaded / "run.json").read_text())
    values = record["steps"]["evaluate_4_grpo"]["values"]
    record["steps"]["evaluate_4_grpo"]["values"] = {key: item for key, item in values.items() if key not in without}
    (downloaded / "run.json").write_text(json.dumps(record))
    assert "--trust stranger:act" in refused(capsys, "evaluate", downloaded, "--stage", "4_grpo")
    assert not marker.exists()


def test_watching_a_rollout_loads_no_reward_of_the_folder(downloaded: Path, marker: Path) -> None:
    watch = pytest.importorskip("pipeline.app.watch")
    loaded = Models(downloaded).get("4_grpo")
    settings = watch.stage_settings(downloaded, "4_grpo")
    with only_trusted([]), pytest.raises(UserError, match="--trust stranger:act"):
        watch.update(loaded, loaded, settings, {"prompt": []}, [])
    assert not marker.exists()


def test_data_outside_of_the_run_are_not_shown(
    downloaded: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page shows held-out prompts to its visitors; a run could name any file of the machine."""
    outside = tmp_path_factory.mktemp("private") / "data.jsonl"
    outside.write_text((downloaded / "data.jsonl").read_text())
    record = json.loads((downloaded / "run.json").read_text())
    source = {"dataset_name": str(outside), "validation_share": 0.5}
    values = {"problems": source, "prompts": source, "trained_on": {"prompts": source}}
    record["steps"]["evaluate_4_grpo"]["values"] |= values
    (downloaded / "run.json").write_text(json.dumps(record))
    with only_trusted([]):
        assert held_out_prompts(downloaded) == []
        assert "prompts" not in evaluation_settings(downloaded).facts.trained_on
    assert f"--trust {outside}" in capsys.readouterr().err
    with only_trusted([str(outside)]):
        assert held_out_prompts(downloaded)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation_internal", "experts_implementation"])
def test_a_configuration_names_no_kernel_of_the_hub(key: str, downloaded: Path) -> None:
    """With the package `kernels`, transformers would download and import it as soon as the model is built."""
    config = downloaded / "4_grpo" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: "stranger/kernel"}))
    with pytest.raises(UserError, match="names the kernel stranger/kernel, which is code from the Hub"):
        Models(downloaded).get("4_grpo")


def test_code_in_the_folder_of_a_model_is_not_run(downloaded: Path, marker: Path) -> None:
    folder = downloaded / "4_grpo"
    for name in ("stranger.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(marker)))
    classes = {"AutoConfig": "stranger.Game", "AutoModelForCausalLM": "stranger.Game"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": str(folder)}))
    assert Models(downloaded).get("4_grpo")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    custom = {"auto_map": {"AutoTokenizer": ["stranger.Game", None]}, "tokenizer_class": "Game"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **custom}))
    with pytest.raises(UserError):
        Models(downloaded).get("4_grpo")
    assert not marker.exists()


class Payload:
    """Write the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "unpickled")


@pytest.fixture
def hostile(downloaded: Path, marker: Path) -> Path:
    """A run whose model, checkpoint and data set bring code as well, and pickles."""
    code = CODE.format(marker=str(marker))
    model, data = downloaded / "4_grpo", downloaded / "data"
    data.mkdir()
    for file in (model / "stranger.py", model / "custom_generate" / "generate.py", data / "data.py"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    config = json.loads((model / "config.json").read_text())
    classes = {"AutoConfig": "stranger.Game", "AutoModelForCausalLM": "stranger.Game"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    # A tokenizer that can call tools, and what the page needs to watch a step, and the report to be written.
    train_tokenizer((TEXT * 20,), vocab_size=300, model_max_length=256, tools=True).save_pretrained(model)
    sampled = {"num_generations": 2, "max_completion_length": 4, "temperature": 1.0, "learning_rate": 1e-3}
    arguments = json.loads((model / "arguments.json").read_text())
    (model / "arguments.json").write_text(json.dumps(arguments | sampled))
    log = {"log_history": [{"step": 1, "loss": 1.0}], "global_step": 1}
    (model / "trainer_state.json").write_text(json.dumps(log))
    (data / "data.jsonl").write_text((downloaded / "data.jsonl").read_text())
    (data / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n")
    checkpoint = model / "checkpoint-3"
    shutil.copytree(model, checkpoint)
    for folder in (model, checkpoint):
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
            torch.save(Payload(marker), folder / name)
    record = json.loads((downloaded / "run.json").read_text())
    source = {"dataset_name": str(data), "grade": "stranger:act"}
    record["steps"]["evaluate_4_grpo"]["values"] |= {"problems": source, "trained_on": {"prompts": source}}
    (downloaded / "run.json").write_text(json.dumps(record))
    return downloaded


def visit(app: Any, **_: Any) -> None:
    """Do what a visitor of the page can do."""
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/").status_code == client.get("/report").status_code == 200
        prompts = client.post("/prompts").json()
        assert prompts, "the data of the run are shown"
        text = prompts[0]["text"]
        answer = client.post("/compare", json={"text": text, "models": ["4_grpo"], "longest": 4})
        assert answer.status_code == 200 and "failed" not in answer.text
        watched = client.post("/rollout", json={"stage": "4_grpo", "policy": "4_grpo", "text": text})
        assert "tools: stranger:act: is named by a file of this folder" in watched.text


@pytest.mark.parametrize("command", ["chat", "chat checkpoint", "app", "evaluate", "report", "status", "merge", "gguf"])
def test_no_command_runs_what_a_strangers_folder_brings(
    command: str, hostile: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/example\n/stage 4_grpo\n"))
    model = hostile / "4_grpo"
    arguments = {
        "chat": ["chat", str(model), "--max_new_tokens", "4"],
        "chat checkpoint": ["chat", str(model / "checkpoint-3"), "--max_new_tokens", "4"],
        "app": ["app", str(hostile)],
        "evaluate": ["evaluate", str(hostile), "--stage", "4_grpo"],
        "report": ["report", str(hostile)],
        "status": ["status", str(hostile)],
        "merge": ["merge", str(model), "--output_dir", str(hostile / "merged")],
        "gguf": ["gguf", str(model), str(hostile / "model.gguf")],
    }[command]
    if command == "app":
        pytest.importorskip("krippendorff")
        monkeypatch.setattr("uvicorn.run", visit)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(str(stop.code))
    assert not marker.exists()
    if command in ("chat", "chat checkpoint", "app", "report"):
        # They must get as far as they would with one's own folder.
        assert code == 0
    elif command != "status":
        assert code == 2


def test_a_converter_that_trusts_code_gets_no_model_that_brings_some(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp's converter loads some tokenizers with `trust_remote_code=True`."""
    message = refused(capsys, "gguf", hostile / "4_grpo", hostile / "model.gguf")
    assert "its config.json names code in `auto_map`" in message


@pytest.mark.parametrize(
    "path", ["{outside}", "../../private/data.jsonl", "https://127.0.0.1:9/data.jsonl", "~/a.jsonl"]
)
def test_the_card_of_a_data_set_names_no_file_outside_of_it(path: str, tmp_path: Path) -> None:
    """`datasets` reads any file of the machine that the card names, and the page shows its rows."""
    outside, folder = tmp_path / "private" / "data.jsonl", tmp_path / "run" / "data"
    for place in (outside.parent, folder):
        place.mkdir(parents=True)
    outside.write_text('{"prompt": "What is 12?", "answer": "12"}\n')
    path = path.format(outside=outside)
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: [{}]\n---\n"
    (folder / "README.md").write_text(card.format(json.dumps(path)))
    with pytest.raises(UserError, match=r"its README\.md names .*, which is outside of it"):
        open_source(str(folder))
    (folder / "own.jsonl").write_text(outside.read_text())
    (folder / "README.md").write_text(card.format("own.jsonl"))
    assert open_source(str(folder))["test"].num_rows == 1


def test_links_of_a_run_to_data_outside_are_not_followed(
    downloaded: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path_factory.mktemp("private") / "data.jsonl"
    (downloaded / "data.jsonl").rename(outside)
    (downloaded / "data").mkdir()
    (downloaded / "data" / "test.jsonl").symlink_to(outside)
    record = json.loads((downloaded / "run.json").read_text())
    source = {"dataset_name": str(downloaded / "data")}
    record["steps"]["evaluate_4_grpo"]["values"] |= {"problems": source, "prompts": source, "trained_on": {}}
    (downloaded / "run.json").write_text(json.dumps(record))
    with only_trusted([]):
        assert held_out_prompts(downloaded) == []
    assert f"--trust {downloaded / 'data'}" in capsys.readouterr().err
    with only_trusted([str(downloaded / "data")]):
        assert held_out_prompts(downloaded)
