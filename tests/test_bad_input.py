"""Everything that is refused before a run begins: one line a problem, exit code 2, nothing written."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from small_model import conversation, recipe_command, run_recipe, tokenizer, write_lines

from pipeline import hardware
from pipeline.arguments import parse
from pipeline.errors import exit_on_user_error


def arguments_of(recipe: str) -> tuple[Any, list[type]]:
    """A recipe's `main`, and the dataclasses that it takes."""
    main = importlib.import_module(f"recipes.{recipe}").main
    return main, [hint for name, hint in get_type_hints(main).items() if name != "return"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    recipe_command("sft", folder)  # makes the good ones
    save_odd_models(folder)
    return folder


def save_odd_models(folder: Path) -> None:
    import copy

    def variant(name: str, change: Callable[[Any], None]) -> None:
        shutil.copytree(folder / "model", folder / name)
        changed = copy.deepcopy(tokenizer())
        change(changed)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name / file).unlink(missing_ok=True)
        changed.save_pretrained(folder / name)

    variant("pad-is-eos", lambda words: setattr(words, "pad_token", words.eos_token))
    variant("no-template", lambda words: setattr(words, "chat_template", None))
    variant(
        "no-marks",
        lambda words: setattr(words, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    )
    variant("more-words", lambda words: words.add_tokens([f"new{i}" for i in range(9)]))
    shutil.copytree(folder / "model", folder / "no-weights-of-a-language-model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (folder / "no-weights-of-a-language-model" / "config.json").write_text(json.dumps(config))
    (folder / "no-model").mkdir()


def refuse(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a recipe that must refuse; the lines that it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exited, exit_on_user_error():
        main, types = arguments_of(recipe)
        main(*parse(*types, argv=argv))
    assert exited.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    return [line for line in lines if line and "examples" not in line]  # bars of `datasets`


@dataclass
class Case:
    """What is given beside good arguments, and what must be said.

    Args:
        recipe: Which recipe.
        argv: Command line; `{inputs}` and `{here}` are replaced.
        said: Words of one line, the field first.
        yaml: Content of a `--config` file.
        files: Files made in `{here}`, by name.
        lines: How many problems there are.
    """

    recipe: str
    argv: str
    said: tuple[str, ...]
    yaml: str | None = None
    files: dict[str, Any] = field(default_factory=dict)
    lines: int = 1


def rows(*contents: Any) -> str:
    return "".join(json.dumps(content) + "\n" for content in contents)


GOOD = {"messages": conversation("What?", "That.")}

CASES = {
    # the configuration
    "unknown YAML key": Case("sft", "", ("learning_rat:", "did you mean `learning_rate`"), "learning_rat: 1"),
    "unknown option": Case("sft", "--max_lenght 9", ("max_lenght:", "did you mean `max_length`")),
    "abbreviated option": Case("sft", "--learning 1", ("learning:", "unknown")),
    "stray word": Case("sft", "hello", ("command line: hello",)),
    "text for a number": Case("sft", "", ("max_steps: 'ten'", "a whole number"), "max_steps: ten"),
    "fraction for a whole number": Case("sft", "", ("max_steps: 1.5", "a whole number"), "max_steps: 1.5"),
    "number for a switch": Case("sft", "", ("packing: 3", "true or false"), "packing: 3"),
    "list for a number": Case("sft", "", ("learning_rate: [1, 2]", "a number"), "learning_rate: [1, 2]"),
    "nothing for a number": Case("sft", "", ("learning_rate: None", "a number"), "learning_rate:"),
    "text for a number, as an option": Case("sft", "--max_steps ten", ("max_steps: 'ten'", "a whole number")),
    "one of another set": Case("sft", "--eval_strategy often", ("eval_strategy: 'often'", "steps")),
    "unknown optimizer": Case("sft", "--optim sgdd", ("optim: 'sgdd'", "adamw_torch")),
    "unknown schedule": Case("sft", "--lr_scheduler_type zigzag", ("lr_scheduler_type: 'zigzag'", "cosine")),
    "YAML that cannot be read": Case("sft", "", ("--config:", "line 2", "not valid YAML"), "a: 1\n b: [\n"),
    "YAML with a key twice": Case("sft", "", ("--config:", "line 2", "twice"), "seed: 1\nseed: 2"),
    "YAML that is no mapping": Case("sft", "", ("--config:", "`field: value`"), "- seed"),
    "empty YAML": Case("sft", "", ("--config:", "`field: value`"), ""),
    "missing YAML": Case("sft", "--config {here}/missing.yaml", ("--config:", "cannot be read")),
    "a folder as YAML": Case("sft", "--config {here}", ("--config:", "cannot be read")),
    "YAML not named": Case("sft", "--config", ("--config:", "give the path")),
    "negative learning rate": Case("sft", "--learning_rate -1", ("learning_rate: -1.0", "above 0")),
    "learning rate that is no number": Case("sft", "--learning_rate nan", ("learning_rate: nan", "above 0")),
    "no steps": Case("sft", "--max_steps 0", ("max_steps: 0", "at least 1")),
    "no epochs": Case("sft", "--num_train_epochs 0", ("num_train_epochs: 0", "above 0")),
    "empty batch": Case(
        "sft", "--per_device_train_batch_size 0", ("per_device_train_batch_size: 0", "at least 1")
    ),
    "no accumulation": Case("sft", "--gradient_accumulation_steps 0", ("gradient_accumulation_steps: 0",)),
    "never saved": Case("sft", "--save_steps 0", ("save_steps: 0", "above 0")),
    "no checkpoint kept": Case("sft", "--save_total_limit 0", ("save_total_limit: 0", "at least 1")),
    "negative seed": Case("sft", "--seed -1", ("seed: -1", "between 0")),
    "rank of nothing": Case("sft", "--use_peft --lora_r 0", ("lora_r: 0", "at least 1")),
    "remote code": Case("sft", "--trust_remote_code true", ("trust_remote_code: True", "never run")),
    "two precisions": Case("sft", "--fp16 --bf16", ("fp16: True", "lacks it"), lines=2),
    "a stream without end": Case("sft", "--dataset_streaming --max_steps -1", ("max_steps: -1", "no length")),
    "a checkpoint that isn't there": Case(
        "sft", "--resume_from_checkpoint {here}/c", ("resume_from_checkpoint:",)
    ),
    # the data
    "no data set": Case("sft", "--dataset_name null", ("dataset_name: nothing", "give a Hub id")),
    "missing file": Case("sft", "--dataset_name {here}/no.jsonl", ("dataset_name:", "no such file")),
    "unknown type of file": Case(
        "sft",
        "--dataset_name {here}/a.docx",
        ("dataset_name:", "not read", ".parquet"),
        files={"a.docx": "x"},
    ),
    "no such split": Case(
        "sft", "--dataset_train_split rain", ("dataset_train_split: rain", "choose from: train")
    ),
    "no such test split": Case(
        "sft", "--validation_share 0", ("dataset_test_split: validation", "choose from: train")
    ),
    "trained on the test": Case(
        "sft", "--dataset_test_split train", ("dataset_test_split: train", "training split")
    ),
    "no such column": Case(
        "sft", "--messages_column talk", ("messages_column: talk", "choose from: messages")
    ),
    "no such prompts": Case(
        "sft", "--completion_column reply", ("completion_column: reply", "choose from: messages"), lines=2
    ),
    "no such text": Case("pretrain", "--text_column body", ("text_column: body", "choose from: text")),
    "no such configuration": Case(
        "sft",
        "--dataset_name {here}/hub --dataset_config b",
        ("dataset_config: b", "choose from: a"),
        files={
            "hub/README.md": "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n---\n",
            "hub/a.jsonl": rows(GOOD),
        },
    ),
    "empty file": Case(
        "sft", "--dataset_name {here}/a.jsonl", ("dataset_name:", "a.jsonl"), files={"a.jsonl": ""}
    ),
    "empty folder": Case(
        "sft", "--dataset_name {here}/folder", ("dataset_name:", "no data"), files={"folder/": ""}
    ),
    "corrupt line": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "a.jsonl, line 3", "not valid JSON"),
        files={"a.jsonl": rows(GOOD, GOOD) + '{"messages": [\n' + rows(GOOD)},
    ),
    "corrupt parquet": Case(
        "sft",
        "--dataset_name {here}/a.parquet",
        ("dataset_name:", "a.parquet"),
        files={"a.parquet": "PAR1xxxxPAR1"},
    ),
    "not gzipped": Case(
        "sft",
        "--dataset_name {here}/a.jsonl.gz",
        ("dataset_name:", "a.jsonl.gz"),
        files={"a.jsonl.gz": rows(GOOD)},
    ),
    "no messages in a row": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 2", "not a list of messages"),
        files={"a.jsonl": rows(GOOD, GOOD, {"messages": []}, GOOD)},
    ),
    "an unknown role": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "role 'robot'"),
        files={"a.jsonl": rows(GOOD, {"messages": [{"role": "robot", "content": "?"}]})},
    ),
    "no content": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "None, not text"),
        files={"a.jsonl": rows(GOOD, {"messages": [{"role": "user", "content": None}]})},
    ),
    "the user has the last word": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "ends with the role user"),
        files={"a.jsonl": rows({"messages": GOOD["messages"][:1]})},
    ),
    "a text that is none": Case(
        "pretrain",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "None"),
        files={"a.jsonl": rows({"text": "a"}, {"text": None})},
    ),
    "two equal answers": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "the same"),
        files={"a.jsonl": rows({"prompt": "What?", "chosen": "That.", "rejected": "That."})},
    ),
    "answers without a prompt": Case(
        "reward",
        "--dataset_name {inputs}/text.txt",
        ("rejected_column: rejected", "choose from: text"),
        lines=2,
    ),
    "too little text": Case(
        "pretrain",
        "--dataset_name {here}/a.txt --eval_strategy no",
        ("block_size: 64", "fill no block"),
        files={"a.txt": "Hello.\n"},
    ),
    "a batch that drops all": Case(
        "sft",
        "--dataset_name {here}/a.jsonl --dataloader_drop_last --eval_strategy no",
        ("per_device_train_batch_size: 4", "has 2"),
        files={"a.jsonl": rows(GOOD, GOOD)},
    ),
    "prompts that leave no room": Case("sft", "--max_length 4", ("max_length: 4", "no answer would be left")),
    "pairs that all are too long": Case("reward", "--max_length 4", ("max_length: 4", "would be dropped")),
    # the model and its tokenizer
    "no model": Case("sft", "--model_name_or_path null", ("model_name_or_path: nothing", "give a Hub id")),
    "a folder without a model": Case(
        "sft", "--model_name_or_path {inputs}/no-model", ("model_name_or_path:", "holds no model")
    ),
    "a folder without a tokenizer": Case(
        "pretrain", "--tokenizer_name_or_path {inputs}/no-model", ("tokenizer_name_or_path:", "no tokenizer")
    ),
    "a reward model to tune": Case(
        "sft",
        "--model_name_or_path {inputs}/no-weights-of-a-language-model",
        ("model_name_or_path:", "a reward model"),
    ),
    "pad that is eos": Case(
        "sft", "--model_name_or_path {inputs}/pad-is-eos", ("model_name_or_path:", "eos token")
    ),
    "no chat template": Case(
        "sft", "--model_name_or_path {inputs}/no-template", ("model_name_or_path:", "template")
    ),
    "no generation mark": Case(
        "sft", "--model_name_or_path {inputs}/no-marks", ("model_name_or_path:", "generation")
    ),
    "more words than the model": Case(
        "sft", "--model_name_or_path {inputs}/more-words", ("model_name_or_path:", "knows", "tokens")
    ),
    "blocks beyond the positions": Case(
        "pretrain", "--block_size 512 --max_position_embeddings 256", ("block_size: 512", "sees 256 tokens")
    ),
    "sequences beyond the positions": Case("sft", "--max_length 512", ("max_length: 512", "sees 256 tokens")),
    "LoRA on nothing": Case(
        "sft", "--use_peft --lora_target_modules qkv", ("lora_target_modules: qkv", "choose from", "q_proj")
    ),
    "heads that don't divide": Case(
        "pretrain", "--hidden_size 33 --num_attention_heads 2", ("hidden_size: 33", "multiple")
    ),
    # the output directory
    "a file as output": Case("sft", "--output_dir {inputs}/text.txt", ("output_dir:", "is a file")),
    "below a file": Case("sft", "--output_dir {inputs}/text.txt/run", ("output_dir:", "is a file")),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_with_nothing_written(
    name: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES[name]
    here, output = tmp_path / "here", tmp_path / "output"
    here.mkdir()
    for file, content in case.files.items():
        (here / file).parent.mkdir(parents=True, exist_ok=True)
        (here / file).mkdir() if file.endswith("/") else (here / file).write_text(content)
    monkeypatch.setattr(hardware, "supports", lambda dtype: dtype != "fp16")
    argv = [*recipe_command(case.recipe, inputs, "--output_dir", str(output))[2:]]
    argv += case.argv.format(inputs=inputs, here=here).split()
    if case.yaml is not None:
        (here / "config.yaml").write_text(case.yaml)
        for key in [line.split(":")[0] for line in case.yaml.split("\n") if ":" in line]:
            if f"--{key}" in argv:  # the command line would win
                position = argv.index(f"--{key}")
                end = position + 1
                while end < len(argv) and not argv[end].startswith("--"):
                    end += 1
                del argv[position:end]
        argv += ["--config", str(here / "config.yaml")]
    files = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}

    lines = refuse(case.recipe, argv, capsys)

    matching = [
        line for line in lines if line.startswith(case.said[0]) and all(word in line for word in case.said)
    ]
    assert len(matching) == 1, "\n".join(lines)
    assert len(lines) == case.lines, "only that is wrong:\n" + "\n".join(lines)
    assert not output.exists()
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == files


def test_all_that_is_wrong_is_told_at_once(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: ten\nlearning_rat: 1\neval_strategy: often\nmax_length: 9999\n")
    argv = [
        "--config",
        str(config),
        "--model_name_or_path",
        str(inputs / "model"),
        "--seed",
        "x",
        "--foo",
        "1",
    ]
    argv += ["--dataset_name", str(inputs / "pairs.jsonl"), "--use_peft", "--lora_target_modules", "qkv"]
    lines = refuse("sft", [*argv, "--output_dir", str(inputs / "text.txt")], capsys)
    fields = {line.split(":")[0] for line in lines}
    wrong = {"max_steps", "learning_rat", "eval_strategy", "max_length", "seed", "foo", "messages_column"}
    assert fields == {*wrong, "lora_target_modules", "output_dir"}


def test_a_full_disk_is_told_before(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    (line,) = refuse("sft", argv, capsys)
    assert line.startswith("output_dir:") and "3 checkpoints and the model take about" in line
    assert not (tmp_path / "output").exists()


def test_a_directory_that_may_not_be_written(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write anywhere
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    lines = refuse("sft", argv, capsys)
    assert any(line.startswith("output_dir:") and "no permission" in line for line in lines)


@pytest.mark.parametrize("streaming", ["--dataset_streaming", ""])
def test_a_bad_row_is_told_with_its_number_streamed_or_not(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD] * 5 + [{"messages": []}])
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"), "--dataset_name", path)[2:]
    lines = refuse("sft", [*argv, "--eval_strategy", "no", *streaming.split()], capsys)
    assert len(lines) == 1 and "row 5" in lines[0]


def test_the_process_says_it_too(inputs: Path, tmp_path: Path) -> None:
    result = run_recipe("sft", inputs, "--output_dir", str(tmp_path / "output"), "--max_lenght", "9")
    assert result.returncode == 2
    assert result.stderr.strip().split("\n")[-1] == "max_lenght: 9: unknown field; did you mean `max_length`?"
    assert not (tmp_path / "output").exists()


def test_a_token_is_not_told_nor_written(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    lines = refuse("sft", [*argv, "--hub_token", "hf_secret", "--max_lenght", "9"], capsys)
    assert "hf_secret" not in "\n".join(lines)
    _, args, *_ = parse(*arguments_of("sft")[1], argv=[*argv, "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(vars(args))
