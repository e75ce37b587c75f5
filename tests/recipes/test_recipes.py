"""Recipes as they are launched: one process, two, killed, interrupted, started again."""

import importlib
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from pipeline import launch
from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from tests.helpers.emulated_gpus import emulated_gpus
from tests.helpers.forked import Started
from tests.helpers.sampling_recipes import write_config
from tests.helpers.small_model import equal, recipe_command, run_recipe, save_tokenizer, weights

RECIPES = ["pretrain", "sft", "reward", "dpo", "kto"]
FP32 = ("--bf16", "false")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module", params=RECIPES)
def whole(request: pytest.FixtureRequest, inputs: Path) -> tuple[str, Path, str]:
    """An undisturbed run in one process: its recipe, its output directory and what it logged."""
    recipe = request.param
    output = inputs / f"{recipe}-whole"
    result = run_recipe(recipe, inputs, *FP32, "--output_dir", str(output))
    assert result.returncode == 0, result.stderr
    return recipe, output, result.stderr + result.stdout


def test_the_saved_model_loads_with_from_pretrained(whole: tuple[str, Path, str]) -> None:
    recipe, output, log = whole
    kind = AutoModelForSequenceClassification if recipe == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.float32
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert (output / "README.md").exists()
    assert not list(output.rglob("training_args.bin"))
    assert "fourstage" in (output / "README.md").read_text()
    for active in (
        "processes   1 on cpu",
        "sharding    none",
        "precision   fp32",
        "threads",
        "memory",
        "batch       4 seq",
    ):
        assert active in log
    assert re.search(r"^step +\d+/\d+: loss [\d.]+, .*learning rate [\d.]+e.*, [\d,]+ tokens/s", log, re.MULTILINE)
    assert "{'" not in log and "\r" not in log, "neither dictionaries nor bars"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("tokens_per_second" in entry and "mfu" in entry and "eta_seconds" in entry for entry in history)
    assert any("eval_loss" in entry for entry in history)
    assert recipe != "pretrain" or any(0 < entry.get("eval_bits_per_byte", 0) < 10 for entry in history)


def test_killed_while_it_saves_and_started_again_it_ends_with_the_same_weights(
    whole: tuple[str, Path, str], inputs: Path
) -> None:
    recipe, output, _ = whole
    parts = inputs / f"{recipe}-parts"
    command = [sys.executable, *recipe_command(recipe, inputs, *FP32, "--output_dir", str(parts))]
    with Started(command) as run:
        while run.is_running and not (parts / "checkpoint-2").exists():
            time.sleep(0.002)
        while run.is_running and not (parts / ".unfinished").exists():
            time.sleep(0.0005)
        run.kill()
        assert run.wait() == -signal.SIGKILL
    assert not (parts / "README.md").exists(), "the card comes with the finished model"
    again = run_recipe(recipe, inputs, *FP32, "--output_dir", str(parts))
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    assert equal(weights(parts), weights(output))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_reports_how_to_resume(inputs: Path, number: signal.Signals) -> None:
    output = inputs / f"interrupted-{number.name}"
    more = (
        "--output_dir",
        str(output),
        "--max_steps",
        "5000",
        "--save_steps",
        "4000",
        "--eval_strategy",
        "no",
    )
    command = [sys.executable, *recipe_command("pretrain", inputs, *more)]
    with Started(command) as run:
        while run.is_running and "\nbatch" not in run.written():
            time.sleep(0.02)
        time.sleep(1)
        run.send_signal(number)
        assert run.wait() == 128 + number
        written = run.written()
    assert "The same command resumes from there" in written and "Traceback" not in written
    saved = [path for path in output.glob("checkpoint-*") if (path / "manifest.json").exists()]
    assert len(saved) == 1
    assert not (output / "model.safetensors").exists()


# All recipes behave alike here, and one of them is enough.
@pytest.mark.parametrize("whole", ["pretrain"], indirect=True)
def test_another_configuration_is_refused_and_the_same_one_is_not_trained_twice(
    whole: tuple[str, Path, str], inputs: Path
) -> None:
    recipe, output, _ = whole
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    refused = run_recipe(recipe, inputs, *FP32, "--output_dir", str(output), "--learning_rate", "2e-3")
    assert refused.returncode == 2
    assert "learning_rate was 0.001 and is 0.002" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    trained = weights(output)
    again = run_recipe(recipe, inputs, *FP32, "--output_dir", str(output))
    assert again.returncode == 0, again.stderr
    assert "loss" not in again.stdout + again.stderr
    assert equal(weights(output), trained)


# All recipes behave alike here, and one of them is enough.
@pytest.mark.parametrize("whole", ["pretrain"], indirect=True)
def test_a_finished_run_goes_on_where_more_steps_are_asked_for(
    whole: tuple[str, Path, str], inputs: Path, tmp_path: Path
) -> None:
    recipe, output, _ = whole
    longer = Path(shutil.copytree(output, tmp_path / "longer"))
    more = ("--max_steps", "11", "--logging_steps", "2", "--output_dir", str(longer))
    again = run_recipe(recipe, inputs, *FP32, *more)
    assert again.returncode == 0, again.stderr
    assert "continuing  at step 8, to 11 steps instead of 8: the learning rate follows" in again.stderr
    assert not equal(weights(longer), weights(output))
    history = json.loads((longer / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [*range(1, 9), 10]
    resumed = ("--resume_from_checkpoint", str(output / "checkpoint-8"), "--output_dir", str(tmp_path / "other"))
    assert run_recipe(recipe, inputs, *FP32, *more, *resumed).returncode == 0
    assert equal(weights(tmp_path / "other"), weights(longer))
    fewer = run_recipe(recipe, inputs, *FP32, *resumed, "--max_steps", "7", "--output_dir", str(tmp_path / "fewer"))
    assert fewer.returncode == 2 and "max_steps: 7: the checkpoint already has 8 steps" in fewer.stderr
    assert not (tmp_path / "fewer").exists()


def adapted(folder: Path) -> str:
    """Save an adapter of the small model, as a stage of LoRA leaves it to the next one."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), lora).save_pretrained(folder / "adapter")
    return save_tokenizer(folder / "adapter")


@pytest.mark.parametrize(
    ("recipe", "lora"),
    [*((recipe, False) for recipe in [*RECIPES, "ppo", "grpo"]), ("sft", True), ("reward", True), ("dpo", True)],
)
def test_on_several_gpus_a_process_has_its_batch_and_its_model_on_one(
    recipe: str, lora: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a stage of LoRA that starts from another one's adapter, here on the second process of two."""
    group = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} if lora else {}
    arguments = recipe_command("sft" if recipe in ("ppo", "grpo") else recipe, tmp_path)[2:]
    if recipe in ("ppo", "grpo"):
        arguments = write_config(recipe, tmp_path, bf16=True)
    elif lora:
        arguments += ["--model_name_or_path", adapted(tmp_path), "--use_peft"]
    main = importlib.import_module(f"recipes.{recipe}").main
    trainers: list[Any] = []
    placed: list[Any] = []
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
        placed.append(device_map)
        return load(cls, *args, **kwargs)

    with (
        emulated_gpus(4, **group),
        patch("pipeline.training.train.train_and_save", trainers.append),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
    ):
        main(*parse(*argument_types(main), argv=[*arguments, "--output_dir", str(tmp_path / "run")]))
        (trainer,) = trainers
        with caplog.at_level("INFO"):
            launch.log_active(trainer)
        assert lora or ("one of 4 GPUs" in caplog.text and "sequences = 4 x " in caplog.text)
        assert (trainer.args.n_gpu, trainer.args.train_batch_size, trainer.args.world_size) == (1, 4, 1 + lora)
        assert str(trainer.args.device) == f"cuda:{int(lora)}" and not trainer.is_model_parallel
    assert not any(placed) and bool(placed) == (recipe != "pretrain"), "TRL's default would spread the layers"
