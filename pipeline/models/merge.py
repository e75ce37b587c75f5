"""`python -m pipeline merge ADAPTER --output_dir DIR`: write a LoRA adapter and its base model as one model."""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.errors import Problem, UserError, refuse
from pipeline.files import check_new_directory, read_json, write_folder
from pipeline.launch import quiet_libraries
from pipeline.models import loading
from pipeline.models.adapters import merge_into_base
from pipeline.models.weights import validate_finite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="directory that a recipe with use_peft has written")
    parser.add_argument("--output_dir", type=Path, required=True, help="new directory for the merged model")


def main(args: argparse.Namespace) -> int:
    """Merge an adapter, and save the model with its tokenizer. Return 0.

    Raises:
        UserError: If it is not a LoRA adapter, it or its base model is broken, or `output_dir` exists.
    """
    quiet_libraries()
    adapter = args.adapter
    output_dir = args.output_dir
    path = adapter / "adapter_config.json"
    if not path.is_file():
        remedy = "does not contain adapter_config.json; give a directory that a recipe with use_peft has written"
        raise UserError(Problem("adapter", adapter, remedy))
    config = read_json(path)
    if not config.get("base_model_name_or_path"):
        raise UserError(Problem("adapter", path, "is damaged or does not name its base_model_name_or_path; add it"))
    if config.get("peft_type") != "LORA":
        raise UserError(Problem("adapter", path, f"has the type {config.get('peft_type')}; only LORA can be merged"))
    refuse(check_new_directory(output_dir, "--output_dir"))
    tokenizer = loading.load_tokenizer(str(adapter), "adapter")
    with loading.user_error_for("adapter", config["base_model_name_or_path"], "base model"):
        base_config = loading.load_config(str(adapter))
    # None is the class that saved the base model.
    model_class: Any = None
    if config.get("task_type") == "TOKEN_CLS":
        # PPO's critic is a token classifier, whatever its base model.
        model_class = AutoModelForTokenClassification
    elif loading.is_reward_model(base_config):
        model_class = AutoModelForSequenceClassification
    fault = loading.validate_layout(str(adapter), base_config, model_class)
    if fault is None:
        # The head of a critic is missing from the base model, and comes from the adapter.
        with loading.user_error_for("adapter", adapter), loading.hide_table_of_weights():
            merged = merge_into_base(str(adapter), model_class, dtype="auto")
        fault = validate_finite(merged.named_parameters())
    if fault is not None:
        raise UserError(Problem("adapter", adapter, fault))
    with write_folder(output_dir) as folder:
        merged.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    print(f"merged {adapter} into {config['base_model_name_or_path']}: {output_dir}")
    return 0
