"""`python -m pipeline merge ADAPTER --output_dir DIR`: write a LoRA adapter and its base model as one model.

python -m pipeline merge runs/lora/2_sft --output_dir runs/lora/2_sft-merged
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, UserError
from pipeline.files import check_directory, write_folder
from pipeline.launch import quiet_libraries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge` to `parser`."""
    parser.add_argument("adapter", type=Path, help="directory that a recipe with use_peft has written")
    parser.add_argument("--output_dir", type=Path, required=True, help="new directory for the merged model")


def main(args: argparse.Namespace) -> int:
    """Merge an adapter, and save the model with its tokenizer.

    Args:
        args: `adapter` and `output_dir` (both `Path`).

    Returns:
        Exit code 0.

    Raises:
        UserError: If the adapter or its base model cannot be loaded, or the output directory is not empty or writable.
    """
    quiet_libraries()
    config = _read_config(args.adapter)
    _check_output_dir(args.output_dir)
    _merge(args.adapter, config, args.output_dir)
    print(f"merged {args.adapter} into {config['base_model_name_or_path']}: {args.output_dir}")
    return 0


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        remedy = "does not contain adapter_config.json; give a directory that a recipe with use_peft has written"
        raise UserError(Problem("adapter", adapter, remedy))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(Problem("adapter", path, f"cannot be read as JSON ({error})")) from error
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise UserError(Problem("adapter", path, "does not name its base_model_name_or_path; add it"))
    if config.get("peft_type") != "LORA":
        raise UserError(Problem("adapter", path, f"has the type {config.get('peft_type')}; only LORA can be merged"))
    return config


def _check_output_dir(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise UserError(Problem("--output_dir", path, "is not empty; name a new directory"))
    if problem := check_directory(path, "--output_dir"):
        raise UserError(problem)


def _merge(adapter: Path, config: dict[str, Any], output_dir: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from pipeline.models.adapters import merge_into_base
    from pipeline.models.loading import (
        is_reward_model,
        load_config,
        load_tokenizer,
        user_error_for,
        validate_finite,
        validate_weights,
        without_table,
    )

    tokenizer = load_tokenizer(str(adapter), "adapter")
    with user_error_for("adapter", config["base_model_name_or_path"], "base model"):
        base = load_config(str(adapter))
    kind = AutoModelForSequenceClassification if is_reward_model(base) else None
    if config.get("task_type") == "TOKEN_CLS":  # the critic of PPO, whatever its base is
        kind = AutoModelForTokenClassification
    fault = validate_weights(str(adapter), base, kind)
    if fault is None:
        with user_error_for("adapter", adapter), without_table():  # the head of a critic is the adapter's
            merged = merge_into_base(str(adapter), kind, dtype="auto")
        fault = validate_finite(merged.named_parameters())
    if fault is not None:
        raise UserError(Problem("adapter", adapter, fault))
    with write_folder(output_dir) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
