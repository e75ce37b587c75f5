"""`python -m pipeline`: its help imports little, and mistakes are reported in one line."""

import json
import os
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from pipeline.__main__ import COMMANDS, main
from tests.helpers.refusals import refused

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "evaluate", "numpy", "pyarrow"}


def loaded_modules(*argv: str) -> set[str]:
    """Return the names of the top-level modules that `python -m pipeline *argv` has imported when it ends."""
    script = (
        "import contextlib, json, runpy, sys\n"
        "sys.argv[1:] = json.loads(sys.argv[1])\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):\n"
        "    runpy.run_module('pipeline', run_name='__main__', alter_sys=True)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(argv)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert all(command in page for command in COMMANDS)


# The others are in pipeline.models, which makes the Auto classes of transformers know its classifiers.
@pytest.mark.parametrize("command", [None, *sorted(COMMANDS.keys() - {"merge", "gguf", "import-gguf"})])
def test_help_imports_nothing_heavy(command: str | None) -> None:
    argv = [command, "--help"] if command else ["--help"]
    assert not loaded_modules(*argv) & HEAVY


@pytest.mark.parametrize(
    ("redirection", "code"),
    [(">&-", 0), ("<&-", 0), ("2>&-", 0), (">/dev/full", 2), ("1</dev/null", 2), (">/dev/null </dev/null", 0)],
)
def test_streams_that_are_closed_or_full_are_not_a_defect(tmp_path: Path, redirection: str, code: int) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"recipe": str(ROOT / "recipes/pocket"), "steps": {}}))
    command = f"{shlex.quote(sys.executable)} -m pipeline status {shlex.quote(str(tmp_path))} {redirection}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stderr.count("\n") == (code == 2), result.stderr


def test_names_that_are_not_utf8_are_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"bad\xff")
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"recipe": str(ROOT / "recipes/pocket"), "steps": {}}))
    assert main(["status", str(run)]) == 0
    assert "bad\\udcff" in capsys.readouterr().out


def test_modules_of_the_working_folder_do_not_shadow_ours(tmp_path: Path) -> None:
    """A `pipeline.py` or `json.py` of the user is not imported instead of the library, nor is what a library tries."""
    for name in ("pipeline.py", "recipes.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit(f'{__file__} was run')")
    # pandas tries to import it.
    (tmp_path / "numexpr.py").write_text("raise SystemExit(f'{__file__} was run')")
    (tmp_path / "my_rewards.py").write_text("import my_words\n\ndef short(completions, **columns): ...\n")
    (tmp_path / "my_words.py").write_text("")
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    ((name, _, entry),) = [settings["options.entry_points"]["console_scripts"].strip().partition(" = ")]
    assert name == "fourstage"
    module, _, function = entry.partition(":")
    # As pip writes it; another test of the runner sees to the steps that it starts.
    script = tmp_path / "bin" / name
    script.parent.mkdir()
    script.write_text(
        f"import sys\nfrom {module} import {function}\n"
        f"try:\n    sys.exit({function}())\nfinally:\n    import json, pandas, recipes; print(recipes.__file__)\n"
        "    from pipeline.rewards.loading import load_reward\n"
        "    load_reward('my_rewards:short', '')\n"
        "    print(load_reward('hidden_taste', '').__code__.co_filename)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipes, annotators = done.stdout.splitlines()[-2:]
    assert "usage: fourstage " in done.stdout and recipes == str(ROOT / "recipes/__init__.py")
    assert annotators == str(ROOT / "recipes/worlds/pocket/annotators.py")


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'trian'" in refused(capsys, "trian")


def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "run", "recipes/nowhere", "--config_file", ROOT / "accelerate_config.yaml")
    assert message == "recipe: recipes/nowhere: does not exist; give a folder with files such as 2_sft.yaml\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["report", "RUN", "--output_dir", ""],
        ["evaluate", "RUN", "--stage", " "],
        ["merge", "ADAPTER", "--output_dir", ""],
    ],
)
def test_an_empty_argument_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    *_, option, value = argv
    assert refused(capsys, *argv) == f"{option}: {value!r}: is empty; give a value, or omit it\n"


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runner.cli.main", lambda _: (tmp_path / "a" / "b").write_text(""))
    message = refused(capsys, "run", "recipes/pocket")
    assert message == f"file: {tmp_path}/a/b: No such file or directory; correct it and try again\n"
