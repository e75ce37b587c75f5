"""What the files of a folder that somebody else made name is not called: functions, tools, judges, tasks, data."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.app.models import Models
from pipeline.app.prompts import held_out_prompts, loadable_tools, settings_of
from pipeline.errors import UserError
from pipeline.rewards.loading import load_function, only_trusted
from tests.small_model import save_model, save_tokenizer

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


def test_a_downloaded_tool_of_an_installed_package_is_not_called(downloaded: Path) -> None:
    """`torch.hub` fits the form of a tool: with it, the model wrote a file wherever it liked."""
    arguments = {"tools": ["torch.hub:download_url_to_file"], "output_dir": "x", "dataset_name": "data.jsonl"}
    (downloaded / "4_grpo" / "arguments.json").write_text(json.dumps(arguments))
    (downloaded / "run.json").unlink()
    with only_trusted([]):
        assert loadable_tools(downloaded) == {}
        with pytest.raises(UserError, match=r"--trust torch\.hub:download_url_to_file"):
            load_function("torch.hub:download_url_to_file", "tools")


def test_built_in_names_need_no_trust(downloaded: Path) -> None:
    names = {"tools": ["calculator"], "output_dir": str(downloaded / "4_grpo"), "dataset_name": "data.jsonl"}
    (downloaded / "4_grpo" / "arguments.json").write_text(json.dumps(names))
    (downloaded / "run.json").unlink()
    with only_trusted([]):
        assert loadable_tools(downloaded) == {"problems": {"tools": ["calculator"]}}
        assert load_function("math_answer", "reward_funcs")


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
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(downloaded), "--stage", "4_grpo"])
    assert stop.value.code == 2
    assert "--trust stranger:act" in capsys.readouterr().err
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
        assert "prompts" not in settings_of(downloaded)["trained_on"]
    assert f"--trust {outside}" in capsys.readouterr().err
    with only_trusted([str(outside)]):
        assert held_out_prompts(downloaded)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
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
