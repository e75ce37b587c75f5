"""Check what a recipe folder from the Hub asks for. Someone else wrote it, and it runs as soon as it is named.

A value is a number, a switch, or a text of one of the fields below; models and data that it names must be on the Hub or
in the run itself. Everything else is refused: files of this machine, code, pushes, other hosts. People who want more
download the folder, read it, and run their copy.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.fields import READ
from pipeline.config.yaml_file import read_yaml
from pipeline.errors import Problem, collect
from pipeline.stages import HELD_OUT

FILE = re.compile(r"\d+_.+\.ya?ml|evaluate\.yaml")
"""Files of a recipe folder that the runner reads, except for the launch file."""

NAMES = (*READ, *HELD_OUT, "judge")
"""Fields that name a model or data; in evaluate.yaml, by an id or by a mapping of fields."""

TEXTS = ("system_prompt", "answer_pattern", "elicit", "fixed_prompts", "vllm_structured_outputs_regex")
"""Fields that may contain any text."""

FUNCTIONS = ("reward_funcs", "tools", "environment", "grade", "judge", "lm_eval_tasks")
"""Fields in which a word with a colon, a slash or a dot names code, or a file that loads code."""

WORDS = (
    "answer_column", "chosen_column", "completion_column", "messages_column", "prompt_column", "rejected_column",
    "text_column", "keep_rows", "document",
    "dataset_config", "dataset_test_split", "dataset_train_split", "model_revision", "eos_token", "pad_token",
    "truncation_mode", "packing_strategy", "pad_to_multiple_of", "reward_funcs", "tools", "environment", "grade",
    "lm_eval_tasks", "against", "world", "misread_signs",
    "algorithm", "model_type", "attn_implementation", "dtype", "frozen_dtype", "cache_implementation",
    "lora_modules_to_save", "lora_target_modules", "lora_target_parameters", "lora_task_type", "loss_type",
    "importance_sampling_level", "kl_estimator", "reward_normalization", "multi_objective_aggregation", "scale_rewards",
    "eval_strategy", "logging_strategy", "save_strategy", "lr_scheduler_type", "metric_for_best_model", "optim",
    "optim_args", "optim_target_modules", "label_names", "length_column_name", "train_sampling_strategy",
    "include_for_metrics", "include_num_input_tokens_seen", "debug", "log_level", "log_level_replica", "report_to",
    "run_name", "project", "ddp_backend", "fsdp", "torch_compile_backend", "torch_compile_mode",
    "dataloader_multiprocessing_context", "vllm_importance_sampling_mode", "vllm_mode", "vllm_model_impl",
)  # fmt: skip
"""Fields whose values are words: names of columns, of methods, of layers."""

CHOICES = {"report_to": ("none", "tensorboard"), "vllm_mode": ("colocate",)}
"""Values that send nothing to another host."""

SWITCHES = re.compile(r"push_to_hub|hub_.+|trust_remote_code|allow_unconfined_code|env|.*kernels.*")
"""Fields that push, run code or change the environment whatever their value."""

PATHS = re.compile(rf"{'|'.join(NAMES)}|.*_(path|dir|file|config|checkpoint)|deepspeed")
"""Fields in which a number acts as text: `dataset_name: 2024` would be a folder on this machine."""


def check_untrusted(folder: Path) -> list[Problem]:
    """Return the values in a downloaded recipe folder that are not allowed, and the files that cannot be read."""
    problems: list[Problem] = []
    contents: dict[str, dict[str, Any]] = {}
    for path in recipe_files(folder):
        with collect(problems):
            contents[path.name] = read_yaml(str(path))
    outputs = [content.get("output_dir") for content in contents.values()]
    homes = {Path(text).parent for text in outputs if isinstance(text, str) and _is_inside(text, 2)}
    for name, content in contents.items():
        for key, value in content.items():
            for text, fault in _faults(str(key), value, homes):
                remedy = f"{fault}; download the folder, read it, and run your copy"
                problems.append(Problem(f"{name}: {key}", text, remedy))
    return problems


def recipe_files(folder: Path) -> list[Path]:
    """Return the files of a downloaded folder that the runner reads."""
    return sorted(path for path in folder.iterdir() if FILE.fullmatch(path.name))


def _faults(key: str, value: Any, homes: set[Path]) -> Iterator[tuple[Any, str]]:
    """Yield the values of a field that a recipe from the Hub may not set, each with the reason.

    A value in a mapping is checked under both keys, joined by a dot: `generation_kwargs.top_h`. In evaluate.yaml, the
    fields of a mapping that names data are checked under their own keys: `problems: {dataset_name: ...}`.
    """
    if SWITCHES.fullmatch(key.rpartition(".")[2]) and value not in (None, False):
        shown = ", ".join(map(str, value)) if isinstance(value, Mapping | list) else value
        yield shown, "a recipe from the Hub may not push, run code or set environment variables"
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _faults(str(inner) if key in HELD_OUT else f"{key}.{inner}", item, homes)
    elif isinstance(value, list):
        for item in value:
            yield from _faults(key, item, homes)
    else:
        # In Python, a bool is an int as well, but a switch never acts as text.
        is_text = isinstance(value, str) or (type(value) in (int, float) and PATHS.fullmatch(key))
        if is_text and (fault := _fault(key, str(value), homes)):
            yield value, fault


def _fault(key: str, text: str, homes: set[Path]) -> str | None:
    """Return why a recipe from the Hub may not set a field to this text, or None."""
    if key in TEXTS or (key == "judge" and text == "votes"):
        return None
    if key in FUNCTIONS and ":" in text:
        return "code from the Hub is never run, nor any other function that a recipe from the Hub names"
    if key == "output_dir":
        wrong = "a recipe from the Hub may only write to a directory below the current one, such as runs/NAME/2_sft"
        # The directory of a stage inside the directory of a run.
        return None if _is_inside(text, depth=2) else wrong
    if key in NAMES:
        if _is_inside(text) and any(Path(text).is_relative_to(home) for home in homes):
            return None
        if not re.fullmatch(r"\w[\w.-]*/[\w-][\w.-]*(@[\w.-]+(/[\w.-]+)*)?", text) or ".." in text:
            return "a recipe from the Hub may only read models and data from the Hub (NAME/repo) and from its own run"
        exists = os.path.exists(text) or os.path.exists(text.partition("@")[0])
        return "is a path on this machine, which a recipe from the Hub may not read" if exists else None
    # Mappings other than these contain numbers and switches only.
    if key not in WORDS and not re.fullmatch(r"(chat_template_kwargs|lr_scheduler_kwargs|tasks)\..+", key):
        return "a recipe from the Hub may not set this field to text"
    if key in CHOICES and text not in CHOICES[key]:
        return f"a recipe from the Hub may only set it to {' or '.join(CHOICES[key])}"
    # A word is neither an option nor a path out of the current directory. Arithmetic signs count as words.
    leaves = "://" in text or text.startswith(("~", "-", "/")) or ".." in Path(text).parts
    names_file = key in ("attn_implementation", *FUNCTIONS) and re.search(r"/|\.ya?ml$", text)
    if (leaves and text not in ("/", "-")) or names_file:
        return "a recipe from the Hub may not name files on this machine, or run code"
    return None


def _is_inside(text: str, depth: int = 1) -> bool:
    """Return whether a path stays below the current directory by at least `depth` folders, none of which is hidden."""
    parts = text.removeprefix("./").rstrip("/").split("/")
    return len(parts) >= depth and all(re.fullmatch(r"\w[^\\:\0]*", part) for part in parts)
