"""Which values of single fields make sense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import Problem


def _at_least(bound: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: bound <= value < math.inf, f"must be a number of at least {bound:g}"


def _above(bound: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: bound < value < math.inf, f"must be a number above {bound:g}"


def _from_to(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return lambda value: low <= value <= high, f"must be between {low:g} and {high:g}"


def _below_one() -> tuple[Callable[[Any], bool], str]:
    return lambda value: 0 <= value < 1, "must be at least 0 and below 1"


MOST_TOKENS = 1 << 24
"""Largest vocabulary that a tokenizer is trained for; the trainer asks for the memory of all of it at once."""

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "learning_rate": _above(0),
    "num_train_epochs": _above(0),
    "max_steps": (lambda value: value == -1 or value >= 1, "must be at least 1, or -1 for num_train_epochs"),
    "per_device_train_batch_size": _at_least(1),
    "per_device_eval_batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "eval_steps": _above(0),
    "eval_delay": _at_least(0),
    "eval_accumulation_steps": _at_least(1),
    "ddp_timeout": _at_least(1),
    "save_steps": _above(0),
    "logging_steps": _above(0),
    "save_total_limit": _at_least(1),
    "warmup_steps": _at_least(0),
    "warmup_ratio": _from_to(0, 1),
    "weight_decay": _at_least(0),
    "max_grad_norm": _at_least(0),
    "adam_beta1": _below_one(),
    "adam_beta2": _below_one(),
    "adam_epsilon": _above(0),
    "label_smoothing_factor": _below_one(),
    "seed": _from_to(0, 2**32 - 1),
    "data_seed": _from_to(0, 2**32 - 1),
    "dataloader_num_workers": _at_least(0),
    "block_size": _at_least(2),
    "max_length": _at_least(2),
    "max_train_samples": _at_least(1),
    "max_eval_samples": _at_least(1),
    "validation_share": _from_to(0, 0.5),
    "lora_r": _at_least(1),
    "lora_alpha": _above(0),
    "lora_dropout": _below_one(),
    "num_generations": _at_least(1),
    "num_iterations": _at_least(1),
    "max_completion_length": _at_least(1),
    "temperature": _above(0),
    "top_p": (lambda value: 0 < value <= 1, "must be above 0 and at most 1"),
    "min_p": _below_one(),
    "top_k": _at_least(0),
    "repetition_penalty": _above(0),
    "beta": _at_least(0),
    "epsilon": _above(0),
    "epsilon_high": _above(0),
    "ref_model_sync_steps": _at_least(1),
    "reward_weights": (math.isfinite, "must be numbers"),
    "steps_per_generation": _at_least(1),
    "generation_batch_size": _at_least(1),
    "num_generations_eval": _at_least(1),
    "neftune_noise_alpha": _above(0),
    "dataset_num_proc": _at_least(1),
    "pad_to_multiple_of": _at_least(1),
    "dataloader_prefetch_factor": _at_least(1),
    "muon_learning_rate": _above(0),
    "embedding_learning_rate": _above(0),
    "kl_coef": _at_least(0),
    "center_rewards_coefficient": _at_least(0),
    "gamma": _from_to(0, 1),
    "lam": _from_to(0, 1),
    "cliprange": _above(0),
    "cliprange_value": _above(0),
    "vf_coef": _at_least(0),
    "value_learning_rate": _at_least(0),
    "missing_eos_penalty": _at_least(0),
    "rope_theta": _above(0),
    "model_max_length": _at_least(1),
    "vocab_size": _from_to(1, MOST_TOKENS),
    "size_mb": _above(0),
    "samples_per_prompt": _at_least(2),
    "pairs_per_prompt": _at_least(1),
    "max_prompts": _at_least(1),
    "max_eval_prompts": _at_least(1),
    "max_new_tokens": _at_least(1),
    "batch_size": _at_least(1),
    "limit": _at_least(1),
    "samples": _at_least(1),
}
"""Fields of any argument dataclass, and the values that make sense (of every item of a list). `None` is left to the
dataclass."""

CHOICES: dict[str, tuple[str, ...]] = {
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "lora_task_type": ("CAUSAL_LM", "SEQ_CLS"),
}
"""Fields that the libraries take any text for, and refuse it, if at all, when training has begun."""

ROLLOUT_CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "luspo", "sapo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_mode": ("server", "colocate"),
}
"""The same of GRPO and PPO, where some names mean something else than elsewhere."""


def check_ranges(asked: Mapping[str, Any]) -> list[Problem]:
    """Numbers that make no sense.

    Args:
        asked: What the user gave, by field.
    """
    problems = []
    for name, (fits, remedy) in RANGES.items():
        value = asked.get(name)
        numbers = [
            item
            for item in (value if isinstance(value, list) else [value])
            if isinstance(item, int | float) and not isinstance(item, bool)
        ]
        if not all(map(fits, numbers)):
            problems.append(Problem(name, value, remedy))
    return problems


def check_choices(asked: Mapping[str, Any], hints: Mapping[str, Any]) -> list[Problem]:
    """Names that nothing is known by, and text where a mapping is wanted.

    Args:
        asked: What the user gave, by field.
        hints: Types of all fields of the stage.
    """
    problems = []
    known = {**CHOICES, **(ROLLOUT_CHOICES if "num_generations" in hints else {})}
    for name, value in asked.items():
        if not isinstance(value, str):
            continue
        if name in known and value not in known[name]:
            problems.append(Problem(name, value, f"must be one of {', '.join(known[name])}"))
        takes_file = not name.endswith("_kwargs")
        if "dict" in str(hints[name]) and not (takes_file and not value.startswith("{")):
            problems += _check_mapping(name, value)
    return problems


def _check_mapping(name: str, text: str) -> list[Problem]:
    wanted = "write a mapping as JSON, such as '{\"name\": 1}'"
    try:
        content = json.loads(text)
    except ValueError as error:
        return [Problem(name, text, f"{wanted} ({error})")]
    return [] if isinstance(content, dict) else [Problem(name, text, wanted)]


def check_together(arguments: Iterable[Any], told: Collection[str]) -> list[Problem]:
    """Fields that make no sense with each other, or with what is on the disk.

    Args:
        arguments: Argument dataclasses.
        told: Fields whose values are wrong already, and have been left out.
    """
    values = {name: getattr(item, name) for item in arguments for name in vars(item)}
    problems = []
    steps = values.get("max_steps", 0)
    if values.get("dataset_streaming") and steps <= 0 and "max_steps" not in told:
        problems.append(Problem("max_steps", steps, "must be given: a stream has no length"))
    layers = f"{values.get('lora_target_modules')} {values.get('lora_modules_to_save')}"
    if values.get("use_peft") and "embed" not in layers and "lm_head" not in layers:
        for field, unset in (("use_muon", "false"), ("embedding_learning_rate", "null")):
            if values.get(field):
                remedy = f"LoRA trains no embeddings; leave it out, or set it to {unset}"
                problems.append(Problem(field, values[field], remedy))
    if values.get("output_dir") == "":
        problems.append(Problem("output_dir", "nothing", "give a directory"))
    if name := values.get("resume_from_checkpoint"):
        otherwise = "leave it out to go on from the newest complete checkpoint"
        if not Path(str(name)).is_dir():
            problems.append(Problem("resume_from_checkpoint", name, f"is no directory; {otherwise}"))
        elif not (Path(str(name)) / "trainer_state.json").is_file():
            problems.append(Problem("resume_from_checkpoint", name, f"is no checkpoint; {otherwise}"))
        elif not _holds_state(Path(str(name)) / "trainer_state.json"):
            problems.append(Problem("resume_from_checkpoint", name, f"is damaged; {otherwise}"))
    if values.get("dataloader_persistent_workers") and not values.get("dataloader_num_workers"):
        problems.append(Problem("dataloader_persistent_workers", True, "needs dataloader_num_workers; leave it out"))
    return problems


def _holds_state(file: Path) -> bool:
    """Whether a checkpoint's record of the training can be read."""
    try:
        return "global_step" in dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return False
