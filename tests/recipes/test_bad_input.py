"""Everything that is refused before a run begins: one line per problem, exit code 2, nothing written."""

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import transformers
import trl
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from pipeline import hardware
from pipeline.config.parser import parse
from pipeline.models import loading
from pipeline.training.entry import run
from tests.helpers.bad_inputs import CASES, GOOD, rows
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused
from tests.helpers.small_model import recipe_command, run_recipe, tokenizer


def arguments_of(recipe: str) -> tuple[Any, list[type]]:
    """Return a recipe's `main`, and the dataclasses that it takes."""
    main = importlib.import_module(f"recipes.{recipe}").main
    return main, [hint for name, hint in get_type_hints(main).items() if name != "return"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    # This makes the valid inputs.
    recipe_command("sft", folder)
    save_odd_models(folder)
    return folder


def save_odd_models(folder: Path) -> None:
    def variant(name: str, change: Callable[[Any], None]) -> None:
        shutil.copytree(folder / "model", folder / name)
        changed = tokenizer()
        change(changed)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name / file).unlink(missing_ok=True)
        changed.save_pretrained(folder / name)

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
    words = folder / "model"

    def damaged(name: str, change: Callable[[Path], object]) -> None:
        shutil.copytree(words, folder / name)
        change(folder / name)

    damaged("cut", lambda path: os.truncate(path / "model.safetensors", 2000))
    damaged("no-weights", lambda path: (path / "model.safetensors").unlink())
    damaged("pickle", lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"))
    damaged("no-config", lambda path: (path / "config.json").unlink())
    damaged("config-cut", lambda path: (path / "config.json").write_text("{"))
    damaged("unknown-kind", lambda path: (path / "config.json").write_text('{"model_type": "foonet"}'))
    damaged("tokenizer-cut", lambda path: (path / "tokenizer.json").write_text("{"))
    damaged("wider", lambda path: change_json(path / "config.json", intermediate_size=8))
    damaged("deeper", lambda path: change_json(path / "config.json", num_hidden_layers=3))
    damaged("encoder", lambda path: change_json(path / "config.json", architectures=["BertForMaskedLM"]))
    damaged("adapter", make_adapter)
    damaged("learned-prompt", make_adapter)
    change_json(folder / "learned-prompt" / "adapter_config.json", peft_type="PROMPT_TUNING")
    damaged("no-heads", lambda path: change_json(path / "config.json", num_attention_heads=0))
    damaged("no-layers", lambda path: change_json(path / "config.json", num_hidden_layers=0))
    damaged("architecture-text", lambda path: change_json(path / "config.json", architectures="LlamaForCausalLM"))
    damaged("architecture-unknown", lambda path: change_json(path / "config.json", architectures=["FooForCausalLM"]))
    damaged("quantised", lambda path: change_json(path / "config.json", quantization_config={"quant_method": "gptq"}))
    damaged("nan", lambda path: fill_with_nan(path / "model.safetensors"))
    damaged("generation", lambda path: (path / "generation_config.json").write_text('{"temperature": -1}'))
    variant("dividing", lambda words: setattr(words, "chat_template", f"{MARKS}{{{{ 1 / 0 }}}}"))
    (folder / "dangling").symlink_to(folder / "nowhere")
    variant("silent", lambda words: setattr(words, "chat_template", SILENT))
    variant("refusing", lambda words: setattr(words, "chat_template", REFUSING))
    AutoModelForSequenceClassification.from_pretrained(words, num_labels=2).save_pretrained(folder / "two-labels")
    tokenizer().save_pretrained(folder / "two-labels")
    (folder / "prompts.jsonl").write_text(rows({"prompt": "What?", "answer": "That."}) * 40)


MARKS = "{% generation %}{% endgeneration %}"
SILENT = "{% generation %}{% endgeneration %}"
REFUSING = MARKS + "{% if messages[0].content != 'Hello' %}{{ raise_exception('too polite') }}{% endif %}Hi"


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fill_with_nan(path: Path) -> None:
    weights = load_file(path)
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})


def make_adapter(path: Path) -> None:
    (path / "config.json").unlink()
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def refuse(recipe: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a recipe that must refuse its input, and return the lines that it prints."""
    error = refused(capsys, *argv, main=partial(run, arguments_of(recipe)[0]))
    lines = error.replace("\r", "\n").strip().split("\n")
    # These words are in progress bars.
    return [line for line in lines if line and "examples" not in line and "Loading weights" not in line]


def command(recipe: str, inputs: Path, output: Path) -> list[str]:
    """Return valid arguments of any recipe."""
    if recipe not in ("ppo", "grpo"):
        return recipe_command(recipe, inputs, "--output_dir", str(output))[2:]
    options = {"model_name_or_path": inputs / "model", "dataset_name": inputs / "prompts.jsonl"}
    more = {"reward_funcs": "exact_answer", "max_completion_length": 8, "max_steps": 2, "output_dir": output}
    batch = {"per_device_train_batch_size": 4, **({"num_generations": 4} if recipe == "grpo" else {})}
    return [word for name, value in {**options, **more, **batch}.items() for word in (f"--{name}", str(value))]


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
        if file.endswith("/"):
            (here / file).mkdir()
        else:
            (here / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(hardware, "supports", lambda dtype: dtype != "fp16")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    argv = command(case.recipe, inputs, output)
    argv += case.argv.format(inputs=inputs, here=here).split()
    if case.yaml is not None:
        (here / "config.yaml").write_bytes(case.yaml if isinstance(case.yaml, bytes) else case.yaml.encode())
        text = (here / "config.yaml").read_text(errors="replace")
        for key in [line.split(":")[0] for line in text.split("\n") if ":" in line]:
            # The command line would override the file.
            if f"--{key}" in argv:
                position = argv.index(f"--{key}")
                end = position + 1
                while end < len(argv) and not argv[end].startswith("--"):
                    end += 1
                del argv[position:end]
        argv += ["--config", str(here / "config.yaml")]
    files = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}

    lines = refuse(case.recipe, argv, capsys)

    matching = [line for line in lines if line.startswith(case.said[0]) and all(word in line for word in case.said)]
    assert len(matching) == 1, "\n".join(lines)
    assert len(lines) == case.lines, "only that is wrong:\n" + "\n".join(lines)
    assert not output.exists()
    assert {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()} == files


DEFECTS = {
    "a renamed argument": (TypeError("unexpected keyword argument 'model_init_kwargs', but got None"), "__init__"),
    "a missing key": (KeyError(None), "training_step"),
}
TRAINERS = {"pretrain": transformers.Trainer, "sft": trl.SFTTrainer, "reward": trl.RewardTrainer, "dpo": trl.DPOTrainer}


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "reward", "dpo", "ppo", "grpo"])
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_not_a_mistake_of_the_user(
    recipe: str, name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its traceback, whatever words it shares with the YAML file, and Python ends with exit code 1."""
    error, method = DEFECTS[name]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    (tmp_path / "config.yaml").write_text("report_to: none\neval_strategy: steps\neval_steps: 1\nseed: 0\n")
    argv = command(recipe, inputs, tmp_path / "output")
    argv = [word for word in argv if word not in ("--eval_strategy", "steps")]
    monkeypatch.setattr(TRAINERS.get(recipe, trl.GRPOTrainer), method, fail)
    with pytest.raises(type(error)) as raised:
        run(arguments_of(recipe)[0], [*argv, "--config", str(tmp_path / "config.yaml")])
    assert raised.value is error


def test_all_arguments_that_are_wrong_are_reported_at_once_and_then_all_inputs(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("max_steps: ten\nlearning_rat: 1\neval_strategy: often\nlora_r: 0\n")
    inputs_of_run = ["--model_name_or_path", str(inputs / "model"), "--dataset_name", str(inputs / "pairs.jsonl")]
    inputs_of_run += ["--max_length", "9999", "--use_peft", "--lora_target_modules", "qkv"]
    wrong = ["--config", str(config), "--seed", "x", "--foo", "1", "--output_dir", str(inputs / "text.txt")]
    lines = refuse("sft", [*inputs_of_run, *wrong], capsys)
    fields = ["eval_strategy", "foo", "learning_rat", "lora_r", "max_steps", "output_dir", "seed"]
    assert sorted(line.split(":")[0] for line in lines) == fields

    lines = refuse("sft", [*inputs_of_run, "--output_dir", str(tmp_path / "run")], capsys)
    assert sorted(line.split(":")[0] for line in lines) == ["lora_target_modules", "max_length", "messages_column"]


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_model_is_not_written_into_the_folder_of_a_run(
    recipe: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is for the folders of all stages: `--output_dir runs/pocket` instead of `runs/pocket/2_sft`."""
    folder = tmp_path / "pocket"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (line,) = refuse(recipe, command(recipe, inputs, folder), capsys)
    assert line == f"output_dir: {folder}: is a run; name a folder in it, such as {folder}/NAME"
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_full_disk_is_reported_before_training(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    (line,) = refuse("sft", argv, capsys)
    assert line.startswith("output_dir:") and "3 checkpoints and the model take about" in line
    assert not (tmp_path / "output").exists()


def test_a_directory_that_may_not_be_written(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Even root cannot create a folder there.
    locked = Path("/proc")
    if not locked.is_dir():
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    argv = recipe_command("sft", inputs, "--output_dir", str(locked / "output"))[2:]
    lines = refuse("sft", argv, capsys)
    assert any(line.startswith("output_dir:") and "no permission" in line for line in lines)


@pytest.mark.parametrize("streaming", ["--dataset_streaming", ""])
def test_a_bad_row_is_reported_with_its_number_streamed_or_not(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [GOOD] * 5 + [{"messages": []}])
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"), "--dataset_name", path)[2:]
    lines = refuse("sft", [*argv, "--eval_strategy", "no", *streaming.split()], capsys)
    assert len(lines) == 1 and "row 5" in lines[0]


def test_a_hub_that_does_not_answer_is_reported_without_delay(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"), "--model_name_or_path", "some/model")
    started = time.monotonic()
    (line,) = refuse("sft", argv[2:], capsys)
    assert line.startswith("model_name_or_path: some/model:") and "the Hub cannot be reached" in line
    assert time.monotonic() - started < 10


def test_the_process_ends_with_the_message(inputs: Path, tmp_path: Path) -> None:
    result = run_recipe("sft", inputs, "--output_dir", str(tmp_path / "output"), "--max_lenght", "9")
    assert result.returncode == 2
    assert result.stderr.strip().split("\n")[-1] == "max_lenght: 9: unknown field; did you mean `max_length`?"
    assert not (tmp_path / "output").exists()


def test_a_token_is_neither_printed_nor_written(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    lines = refuse("sft", [*argv, "--hub_token", "hf_secret", "--max_lenght", "9"], capsys)
    assert "hf_secret" not in "\n".join(lines)
    _, args, *_ = parse(*arguments_of("sft")[1], argv=[*argv, "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(vars(args))


def test_an_unknown_compiler_of_the_launch_file(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "foo")
    argv = recipe_command("sft", inputs, "--output_dir", str(tmp_path / "output"))[2:]
    (line,) = refuse("sft", argv, capsys)
    assert line.startswith("ACCELERATE_DYNAMO_BACKEND: foo:") and "inductor" in line
