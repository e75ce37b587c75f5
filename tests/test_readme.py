"""The pages: their Python runs, their commands and settings are accepted, and the files and metrics they name exist."""

import ast
import json
import re
import shlex
import sys
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
import transformers
import trl
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from pipeline.__main__ import COMMANDS, build_parser, main
from pipeline.config.fields import argument_types, field_types
from pipeline.config.parser import check_values, parse
from pipeline.config.yaml_file import read_yaml
from pipeline.evaluation import harness
from pipeline.evaluation.checks import check
from pipeline.evaluation.evaluate_yaml import EvaluationArguments, RunFacts, Source, complete
from pipeline.evaluation.metric_info import METRICS
from pipeline.preferences.judges import load_judge
from pipeline.rewards.loading import load_reward
from pipeline.rewards.table import REWARDS
from pipeline.tools.environments import ENVIRONMENTS
from pipeline.tools.functions import TOOLS
from pipeline.tools.loading import ToolArguments
from recipes import grpo
from tests.helpers import fresh
from tests.helpers.forked import run_forked
from tests.helpers.small_model import ROOT, conversation, save_model, save_tokenizer
from tests.test_layers import LAYERS

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")]
PAGES += sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/README.md")])
MODULES = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("tests/benchmarks/*.py")]
STAND_INS = {
    " [RUN …]": "",
    "RUN": "runs/x",
    "RECIPES": "recipes/pocket",
    "recipes/NAME": "recipes/pocket",
    "…": "x.txt",
}
STAND_INS |= {"ADAPTER": "runs/x/2_sft", "DIR": "runs/x/merged", "--config FILE": "--config recipes/pocket/2_sft.yaml"}
RECIPES = sorted(path.stem for path in ROOT.glob("recipes/[!_]*.py"))
RECIPES_OF = {ROOT / "docs/ppo.md": ["ppo"], ROOT / "docs/grpo.md": ["grpo"]}
"""Pages about one recipe; a setting on another page may be any recipe's, or one of evaluate.yaml."""
OTHER_SETTINGS = {"field", "publish"}
"""Names before a colon that are no settings: in CONTRIBUTING.md, and a key in the header of a data set's card."""
OTHER_NAMES = {"openai/gsm8k", "broadcast_from_rank0", "fully_shard", "extra_special_tokens"}
"""Names that look like metrics or names in the code, and are of the Hub, of torch, or of a model's files."""
METRIC = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)+|\w+@\w+")
"""What is written as a metric, such as `objective/kl` or `pass@1`; a path looks like one, too."""
FOLDERS = re.compile(r"(data|docs|lessons|models|pipeline|recipes|runs|tests)/")
CHECKED = re.compile(r"(python -m |accelerate launch |pip install |pytest|\.ci/run)")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def code_spans(path: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def printed_commands() -> list[str]:
    """Return every command that a page prints, or a module's docstring on a line of its own."""
    lines: list[str] = []
    for path in PAGES:
        for block in blocks(path, "bash"):
            lines += block.replace("\\\n", " ").split("\n")
        lines += code_spans(path)
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += docstring.replace("\\\n", " ").split("\n")
    # Other spellings of the same command are not tried again: each takes seconds.
    commands = set()
    for line in lines:
        for command in line.partition("  #")[0].split("&&"):
            command = re.sub(r"^\./fourstage test\b", "pytest", command.strip())
            command = re.sub(r"^(\./)?fourstage ", "python -m pipeline ", command)
            command = re.sub(r" run (?=(pocket|gsm8k-shakespeare)( |$))", " run recipes/", command)
            if CHECKED.match(command) and " " in command:
                commands.add(command)
    return sorted(commands)


@pytest.mark.parametrize("command", printed_commands())
def test_a_printed_command_is_accepted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("recipes", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The folder that `python -m pipeline copy pocket mine` writes.
    (tmp_path / "mine").symlink_to(ROOT / "recipes/pocket")
    (tmp_path / "alice").mkdir()
    # A recipe folder that was downloaded from the Hub.
    (tmp_path / "alice" / "recipes").symlink_to(ROOT / "recipes/pocket")
    # recipes/gsm8k-shakespeare reads its data from these folders.
    rows = {
        "text/a.txt": "A text.",
        "questions/a.jsonl": '{"question": "What is 1 and 1?", "answer": "#### 2"}',
        "pairs/a.jsonl": '{"prompt": "What is 1 and 1?", "chosen": "2", "rejected": "3"}',
    }
    for name, row in rows.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text(f"{row}\n" * 40)
    monkeypatch.chdir(tmp_path)
    for placeholder, value in STAND_INS.items():
        command = command.replace(placeholder, value)
    words = shlex.split(command)
    # README sometimes names a subcommand without its arguments.
    if words[:3] == ["python", "-m", "pipeline"] and words[4:] == []:
        assert set(words[3:]) <= set(COMMANDS)
    elif words[:3] == ["python", "-m", "pipeline"]:
        try:
            args, rest = build_parser(words[3:]).parse_known_args(words[3:])
        except SystemExit as stop:
            # `--help` ends with code 0.
            assert stop.code == 0, capsys.readouterr().err
            return
        assert not rest or hasattr(args, "overrides"), rest
        assert args.command != "run" or main([*words[3:], "--dry-run"]) == 0
    elif words[:2] == ["accelerate", "launch"] or words[2:3] == ["pipeline.runner.launcher"]:
        args = launch_command_parser().parse_args(words[2 if words[0] == "accelerate" else 3 :])
        assert args.module and Path(args.config_file).is_file()
        check_recipe(args.training_script, args.training_script_args)
    elif words[0] == "python" and words[2].startswith("recipes."):
        check_recipe(words[2], words[3:])
    elif words[0] == "python" and words[2].startswith("tests.benchmarks."):
        shown = run_forked([sys.executable, *words[1:3], "--help"])
        assert shown.returncode == 0, shown.stderr
        assert all(word in shown.stdout for word in words if word.startswith("--"))
    elif words[:2] == ["pip", "install"]:
        settings = ConfigParser()
        settings.read(ROOT / "setup.cfg")
        extras = re.findall(r"\.\[(\w+)\]", command)
        assert all(extra in settings["options.extras_require"] for extra in extras)
    elif words[0] == "pytest":
        assert "slow" not in command or "slow:" in (ROOT / "setup.cfg").read_text()
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        assert words[:3] == ["python", "-m", "venv"], "a command that nothing here checks"


def check_recipe(module: str, argv: list[str]) -> None:
    """Parse the recipe's arguments as it would, without checking that the files exist."""
    if not {"--help", "--help-all"} & set(argv):
        parse(*argument_types(import_module(module).main), argv=[*argv, "--output_dir", "runs/x/out"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_files_and_modules_that_a_page_names_exist(path: Path) -> None:
    for link in re.findall(r"(?:\]\(|src=\")([\w./-]+)[)\"]", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link
    # `pipeline.py` is a file of a user.
    spans = [span for span in code_spans(path) if "NAME" not in span and span != "pipeline.py"]
    for name in (span for span in spans if re.fullmatch(r"(pipeline|recipes|tests|\.ci)/[\w./-]*", span)):
        assert (ROOT / name).exists(), name
    for name in (span for span in spans if re.fullmatch(r"(pipeline|recipes|tests)\.[\w.]+", span)):
        resolve_name(name)


def rejections(page: Path, setting: dict[str, Any]) -> list[str]:
    """Return what is wrong with a setting in each recipe that has it, or [] if it is accepted in one of them."""
    (name,) = setting
    if page not in RECIPES_OF and name in field_types(EvaluationArguments, Source):
        return []
    faults = [f"{name}: no such setting"]
    for recipe in RECIPES_OF.get(page, RECIPES):
        types = argument_types(import_module(f"recipes.{recipe}").main)
        if name not in field_types(*types):
            continue
        # A setting may only have a meaning together with others, as some do with an adapter.
        required = {"model_name_or_path": "runs/x/2_sft", "dataset_name": "runs/x/data", "output_dir": "runs/x/out"}
        base = {field: value for field, value in required.items() if field in field_types(*types)}
        if recipe in ("ppo", "grpo"):
            base = read_yaml(str(next(ROOT.glob(f"recipes/pocket/*_{recipe}.yaml"))))
        for adapter in ({}, {"use_peft": True}):
            _, problems = check_values(base | adapter | setting, types)
            if not problems:
                return []
            faults += map(str, problems)
    return faults


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_settings_that_a_page_names_are_accepted(path: Path) -> None:
    """A setting is written as in a YAML file: `kl_coef: 0.05`."""
    wrong = []
    for span in code_spans(path):
        match = re.fullmatch(r"(\w+): \S.*", span)
        if match and match[1] not in OTHER_SETTINGS:
            wrong += rejections(path, yaml.safe_load(span))
    assert wrong == []


@cache
def names_in_code() -> tuple[set[str], list[re.Pattern[str]]]:
    """Return the names in the code, and patterns of those that it puts together, such as f"rewards/{name}/mean".

    The code is the project's and that of the trainers which it extends. Names are identifiers and the content of
    strings, without docstrings and comments: a metric is logged under a string.
    """
    libraries = [Path(trl.__file__).parent / "trainer", Path(transformers.__file__).parent]
    paths = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("recipes/**/*.py"), *ROOT.glob("tests/benchmarks/**/*.py")]
    paths += [*libraries[0].glob("*.py"), *libraries[1].glob("train*.py")]
    names: set[str] = set()
    patterns = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {value for value in vars(node).values() if isinstance(value, str)}
            if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                parts = [
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"\w+" for part in node.values
                ]
                if METRIC.fullmatch("".join(parts).replace(r"\w+", "x")):
                    patterns.append(re.compile("".join(parts)))
    return names, patterns


def is_measured_or_logged(name: str) -> bool:
    """Return whether a metric is in the table of metrics, or is logged by a trainer."""
    names, patterns = names_in_code()
    return name in METRICS or name in names or any(pattern.fullmatch(name) for pattern in patterns)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_metrics_columns_and_fields_that_a_page_names_exist(path: Path) -> None:
    """`objective/kl` and `pass@1` are metrics; `frac_reward_zero_std` is a metric, a column, a field or a function."""
    spans = {span for span in code_spans(path) if not FOLDERS.match(span)} - OTHER_NAMES
    metrics = {span for span in spans if METRIC.fullmatch(span)}
    assert {span for span in metrics if not is_measured_or_logged(span)} == set()
    names = {span for span in spans if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)+", span)}
    assert names - METRICS.keys() - names_in_code()[0] == set()


def test_the_settings_of_an_evaluation_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tools, settings = map(yaml.safe_load, blocks(ROOT / "docs/data.md", "yaml"))
    assert not ToolArguments(tools=tools["tools"], environment=tools["environment"]).preflight(None, None, None)
    assert set(tools) <= {field for kind in argument_types(grpo.main) for field in kind.__dataclass_fields__}
    for name in (settings["text"], settings["problems"]["dataset_name"]):
        Path(name).touch()
    # The tests do without lm-eval.
    monkeypatch.setattr(harness, "check_tasks", lambda tasks: [])
    facts = RunFacts("runs/mine")
    assert check(complete(settings, facts), facts) == []


def test_contributing_draws_the_house_as_it_is() -> None:
    tree, layers = (block.splitlines() for block in blocks(ROOT / "CONTRIBUTING.md", "")[:2])
    drawn = {line.split()[0] for line in tree if re.match(r"  \S", line)}
    entries = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "pipeline").iterdir()}
    assert drawn == entries - {"__init__.py", "__pycache__/"}
    assert [set(line.split()) for line in layers] == LAYERS


def test_rewards_and_judges_are_as_the_pages_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = [block for name in ("README.md", "docs/data.md") for block in blocks(ROOT / name, "python")]
    # This one converts conversations, as tests/data/test_folders.py does.
    code = [block for block in code if "speaker" not in block]
    (tmp_path / "of_the_pages.py").write_text("\n".join(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = [conversation("What is 1 + 1?", answer)[1:] for answer in ("2", "I think that it is 2.")]
    for name in ("short", "brevity"):
        reward = load_reward(f"of_the_pages:{name}", "reward_funcs")
        better, worse = reward(completions=answers, prompts=[[], []], answer=["2", "2"], source=["", ""])
        assert better > worse
    row = {"prompt": conversation("What is 1 + 1?", "")[:1]}
    judge = load_judge("of_the_pages:shorter")
    assert judge.match(["2", "2", "It is 2."], ["It is 2.", "2", "2"], [row] * 3) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/ppo.md"])
def test_the_other_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """Each block by itself. That of docs/ppo.md which trains is in the next test."""
    turns = [{"speaker": "customer", "utterance": "Why?"}, {"speaker": "agent", "utterance": "Because."}]
    (tmp_path / "chats.json").write_text(json.dumps([{"turns": turns}]))
    for block in blocks(ROOT / page, "python"):
        if "trainer.train()" not in block:
            fresh.run_python(block, tmp_path)


def test_the_tables_of_rewards_and_of_tools_list_all() -> None:
    named = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name in named if not name[0].isdigit()} == {*REWARDS, *TOOLS, *ENVIRONMENTS}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170
    assert (ROOT / "docs/report.png").stat().st_size < 200_000


def test_the_python_of_the_page_about_ppo_runs_on_a_cpu_without_bf16(tmp_path: Path) -> None:
    model = tmp_path / "runs/pocket/2_sft"
    save_model(model)
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    judge.save_pretrained(tmp_path / "runs/pocket/3_reward")
    save_tokenizer(tmp_path / "runs/pocket/3_reward")
    preferences = tmp_path / "runs/pocket/data/preferences"
    preferences.mkdir(parents=True)
    prompts = [conversation(f"What is {i}?", "")[:1] for i in range(8)]
    Dataset.from_dict({"prompt": prompts}).to_parquet(preferences / "train.parquet")
    python, _ = blocks(ROOT / "docs/ppo.md", "python")
    machine = "import torch\ntorch.cpu.get_capabilities = dict\n"
    fresh.run_python(machine + python, tmp_path)
    assert list((tmp_path / "my-ppo").glob("checkpoint-*/model.safetensors"))
