"""The commands in the recipes' docstrings run as printed, on small stand-ins for the data and models that they name."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from pipeline.models.scratch import ScratchArguments, build_model
from pipeline.stages import STAGES
from recipes.worlds.pocket.build import PocketArguments, build
from tests.helpers.forked import run_forked
from tests.helpers.small_model import ROOT, conversation, save_tokenizer, tokenizer, write_data, write_text

LAUNCH = ["accelerate", "launch", "--config_file", "accelerate_config.yaml"]
TRAINED = ("pretrain", "sft", "reward", "dpo", "kto", "ppo", "grpo")


def commands() -> list[tuple[str, list[str]]]:
    """Kind and arguments of every printed command; the plain pocket runs of trainers are tested with the whole run."""
    found = []
    for kind, step in STAGES.items():
        if not step.module:
            continue
        blocks = re.findall(r"```bash\n(.*?)```", importlib.import_module(step.module).__doc__ or "", re.DOTALL)
        assert blocks, f"{step.module} does not say how to run it"
        for block in blocks:
            words = shlex.split(block.replace("\\\n", " "))
            start = [*(LAUNCH if step.launched else ["python"]), "-m", step.module]
            assert words[: len(start)] == start
            pocket = any(word.startswith("recipes/pocket/") for word in words)
            if kind not in TRAINED or "--output_dir" in words or not pocket:
                found.append((kind, words[len(start) :]))
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a user who has run the first stages, and for whom the Hub is a few local folders."""
    here = tmp_path_factory.mktemp("project")
    (here / "recipes").symlink_to(ROOT / "recipes")
    sizes = ScratchArguments(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048)
    model = build_model(sizes, tokenizer(), 0)
    for name in (
        "runs/pocket/1_pretrain",
        "runs/pocket/2_sft",
        "runs/pocket/3_ppo",
        "runs/pocket-people/2_sft",
        "Qwen/Qwen2.5-0.5B-Instruct",
        "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ):
        model.save_pretrained(here / name)
        save_tokenizer(here / name)
    for name in ("runs/pocket/3_reward", "runs/qwen/3_reward"):
        torch.manual_seed(0)
        judge = AutoModelForSequenceClassification.from_pretrained(here / "runs/pocket/2_sft", num_labels=1)
        judge.save_pretrained(here / name)
        save_tokenizer(here / name)
    for run in ("pocket", "gsm8k-shakespeare"):
        save_tokenizer(here / f"runs/{run}/tokenizer")
    build(
        PocketArguments(
            str(here / "runs/pocket/data"), size_mb=0.2, sft_rows=300, preference_rows=200, reasoning_rows=200
        )
    )
    (here / "runs/pocket-people/data").symlink_to(here / "runs/pocket/data")
    (here / "runs/pocket-dpo").symlink_to(here / "runs/pocket")
    pairs = [
        {"chosen": conversation(f"What is {i}?", f"It is {i}."), "rejected": conversation(f"What is {i}?", "No.")}
        for i in range(80)
    ]
    write_data(here / "runs/pocket/3_preferences", pairs, test="validation")
    write_data(here / "trl-lib/ultrafeedback_binarized", pairs)
    write_data(here / "trl-lib/Capybara", [{"messages": pair["chosen"]} for pair in pairs])
    write_data(here / "trl-lib/ultrafeedback-prompt", [{"prompt": pair["chosen"][:1]} for pair in pairs])
    questions = [{"question": f"{i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(80)]
    write_data(here / "openai/gsm8k", questions, "main")
    write_data(here / "roneneldan/TinyStories", [{"text": "The cat sat on the mat. " * 40}] * 80, test="validation")
    write_text(here / "shakespeare.txt")
    (here / "my_rewards.py").write_text("def brevity(completions, **_):\n    return [-1.0 for _ in completions]\n")
    return here


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "argv"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_printed_command_runs(kind: str, argv: list[str], project: Path, tmp_path: Path) -> None:
    # vLLM needs a GPU.
    argv = [word for word in argv if word != "--use_vllm"]
    if "recipes/pocket-reasoning/0_data.yaml" in argv:
        pytest.importorskip("reasoning_gym")
    if kind in TRAINED:
        argv += shlex.split("--max_steps 1 --save_strategy no --eval_strategy no")
    else:
        argv += [word for name, value in STAGES[kind].smoke.items() for word in (f"--{name}", str(value))]
    if "--max_completion_length" in argv:
        argv += ["--max_completion_length", "16"]
    command = [sys.executable, "-m", STAGES[kind].module, *argv, "--output_dir", str(tmp_path / "out")]
    done = run_forked(command, project)
    assert done.returncode == 0, done.stderr
    written = {"data": "README.md", "tokenizer": "tokenizer.json", "preferences": "README.md", "votes": "README.md"}
    assert list((tmp_path / "out").glob(written.get(kind, "*model.safetensors")))
