"""A tokenizer, a model and data so small that a recipe trains in a second."""

import copy
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.models.scratch import ScratchArguments, build_model
from pipeline.models.tokenizer import train_tokenizer
from tests.helpers.files import write_rows
from tests.helpers.forked import run_forked

ROOT = Path(__file__).parents[2]
TEXT = "The cat sat on the mat. A dog is not a cat, and 12 is not 21. A token is a piece of text.\n"

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""A chat template that, like those of many models on the Hub, does not mark what the assistant says."""


_trained_tokenizer = cache(train_tokenizer)


def tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that the caller may change: nobody else has it."""
    return copy.deepcopy(_trained_tokenizer((TEXT * 20,), vocab_size=300, model_max_length=256))


def save_tokenizer(folder: Path) -> str:
    tokenizer().save_pretrained(folder)
    return str(folder)


def save_model(folder: Path, seed: int = 0) -> str:
    sizes = ScratchArguments(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
    build_model(sizes, tokenizer(), seed).save_pretrained(folder)
    return save_tokenizer(folder)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_conversations(path: Path, number: int = 60) -> str:
    return write_rows(
        path,
        [{"messages": conversation(f"What is {i}?", f"It is {i * 7}. " * (i % 4 + 1))} for i in range(number)],
    )


def write_pairs(path: Path, number: int = 60) -> str:
    rows = []
    for i in range(number):
        prompt, chosen = conversation(f"What is {i}?", f"It is {i}.")
        rejected = {"role": "assistant", "content": "I do not know." + " No." * (i % 5)}
        rows.append({"prompt": [prompt], "chosen": [chosen], "rejected": [rejected]})
    return write_rows(path, rows)


def write_data(folder: Path, rows: list[dict[str, Any]], config: str = "default", test: str = "test") -> None:
    """Write a data set in Hub layout, with the splits `train` and `test`."""
    folder.mkdir(parents=True)
    splits = ("train", test)
    for split in splits:
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")


def write_text(path: Path, lines: int = 2000) -> str:
    path.write_text("".join(f"{i}: {TEXT}" for i in range(lines)))
    return str(path)


def recipe_command(recipe: str, folder: Path, *more: str) -> list[str]:
    """Command line of a recipe on small inputs, which are created in `folder` if they are missing."""
    folder.mkdir(exist_ok=True)
    model, words = folder / "model", folder / "tokenizer"
    if not model.exists():
        save_model(model)
        save_tokenizer(words)
        write_text(folder / "text.txt")
        write_conversations(folder / "conversations.jsonl")
        write_pairs(folder / "pairs.jsonl")
    inputs = {
        "pretrain": [
            "--tokenizer_name_or_path",
            str(words),
            "--dataset_name",
            str(folder / "text.txt"),
            "--block_size",
            "64",
            "--hidden_size",
            "32",
            "--num_hidden_layers",
            "2",
            "--num_attention_heads",
            "2",
            "--max_eval_samples",
            "2",
        ],
        "sft": [
            "--model_name_or_path",
            str(model),
            "--dataset_name",
            str(folder / "conversations.jsonl"),
            "--max_length",
            "128",
            "--packing",
            "--assistant_only_loss",
        ],
        "reward": [
            "--model_name_or_path",
            str(model),
            "--dataset_name",
            str(folder / "pairs.jsonl"),
            "--max_length",
            "128",
        ],
    }
    inputs["dpo"] = inputs["kto"] = inputs["reward"]
    steps = ["--max_steps", "8", "--logging_steps", "1", "--learning_rate", "1e-3", "--disable_tqdm", "true"]
    saves = ["--save_steps", "2", "--save_total_limit", "2", "--eval_strategy", "steps", "--eval_steps", "4"]
    return ["-m", f"recipes.{recipe}", *inputs[recipe], *steps, *saves, "--per_device_train_batch_size", "4", *more]


def run_recipe(
    recipe: str, folder: Path, *more: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a recipe in a process of its own."""
    return run_forked([sys.executable, *recipe_command(recipe, folder, *more)], environment=environment)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two models have the same weights, to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
