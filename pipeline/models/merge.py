"""`python -m pipeline merge ADAPTER --output_dir DIR`: write a LoRA adapter and its base model as one model.

python -m pipeline merge runs/lora/2_sft --output_dir runs/lora/2_sft-merged
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pipeline.errors import Problem, UserError
from pipeline.files import below_a_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge` to `parser`."""
    parser.add_argument("adapter", type=Path, help="directory that a recipe with use_peft has written")
    parser.add_argument("--output_dir", type=Path, required=True, help="new directory for the merged model")


def main(args: argparse.Namespace) -> int:
    """Merge, and save with the tokenizer.

    Args:
        args: `adapter` and `output_dir` (both Path).

    Returns:
        Exit code 0.

    Raises:
        UserError: the adapter or its base model is not there, or the output directory is not empty.
    """
    config = _read_config(args.adapter)
    if problem := below_a_file(args.output_dir, "--output_dir"):
        raise UserError(problem)
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        raise UserError(Problem("--output_dir", args.output_dir, "is not empty; name a new directory"))
    _merge(args.adapter, config, args.output_dir)
    print(f"merged {args.adapter} into {config['base_model_name_or_path']}: {args.output_dir}")
    return 0


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise UserError(Problem("adapter", adapter, "holds no adapter_config.json; give what use_peft saved"))
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(Problem("adapter", path, f"is no JSON: {error}")) from error
    if not isinstance(config, dict) or not config.get("base_model_name_or_path"):
        raise UserError(Problem("adapter", path, "names no base_model_name_or_path"))
    if config.get("peft_type") != "LORA":
        raise UserError(Problem("adapter", path, f"is of the type {config.get('peft_type')}; only LORA can be merged"))
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(Problem("adapter", adapter, "holds no adapter_model.safetensors; give what use_peft saved"))
    return config


def _merge(adapter: Path, config: dict[str, Any], output_dir: Path) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    from pipeline.models.loading import user_error_for

    # A reward model has one output; PEFT's configuration says which head it was trained with.
    if config.get("task_type") == "SEQ_CLS":
        load, options = AutoPeftModelForSequenceClassification.from_pretrained, {"num_labels": 1}
    else:
        load, options = AutoPeftModelForCausalLM.from_pretrained, {}
    try:
        model = load(str(adapter), dtype="auto", **options)
    except OSError as error:
        remedy = f"its base model cannot be loaded: {str(error).splitlines()[0]}"
        raise UserError(Problem("adapter", config["base_model_name_or_path"], remedy)) from error
    except (RuntimeError, SafetensorError) as error:
        remedy = f"its weights do not fit its base model, or are damaged: {str(error).splitlines()[0]}"
        raise UserError(Problem("adapter", adapter, remedy)) from error
    with user_error_for("adapter", adapter, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(adapter))
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(str(output_dir))
    tokenizer.save_pretrained(str(output_dir))
