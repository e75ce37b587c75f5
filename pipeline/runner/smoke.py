"""The settings that `--smoke` overrides for each kind of step: two steps on a miniature of its model and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINING: Mapping[str, Any] = {
    "max_steps": 2,
    "warmup_steps": 1,
    "max_train_samples": 64,
    "max_eval_samples": 16,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "torch_compile": False,
    "report_to": "none",
    "push_to_hub": False,
}
"""So little that two steps take seconds, whatever the recipe asks for."""

ROLLOUTS: Mapping[str, Any] = {
    **TRAINING,
    "per_device_train_batch_size": 4,  # four completions per process and step
    "max_completion_length": 16,
}
MODEL: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "data": {"size_mb": 0.3, "sft_rows": 400, "preference_rows": 64, "reasoning_rows": 128},
    "tokenizer": {"vocab_size": 512, "max_train_samples": 2000},
    "random": MODEL,
    "pretrain": {**MODEL, **TRAINING, "max_train_samples": 512, "block_size": 256},  # few held-out texts fill a block
    "sft": TRAINING,
    "preferences": {"max_prompts": 64, "max_eval_prompts": 32, "max_new_tokens": 16},  # nine in ten pairs are ties
    "votes": {"max_prompts": 64, "max_eval_prompts": 32, "max_new_tokens": 16, "min_votes": 1, "simulated_votes": True},
    "reward": TRAINING,
    "ppo": ROLLOUTS,
    "grpo": {**ROLLOUTS, "num_generations": 4},
    "evaluate": {"limit": 8, "max_new_tokens": 16},
}

LIMITS = ("size_mb", "block_size", "min_votes", "vocab_size", "sft_rows", "preference_rows", "reasoning_rows", "limit")
"""Limits, besides the fields that begin with `max_`. A recipe's own value is kept if it is lower."""


def smoke_overrides(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a step's smoke run overrides, and their values.

    Args:
        kind: Kind of the step, such as "sft".
        values: Content of the step's YAML file.
    """
    overrides = {
        field: value for field, value in OVERRIDES[kind].items() if not _is_lower(field, values.get(field), value)
    }
    if kind in ("ppo", "grpo"):  # TRL refuses a configuration with both
        if "generation_batch_size" in values:
            overrides["generation_batch_size"] = ROLLOUTS["per_device_train_batch_size"]
        else:
            overrides["steps_per_generation"] = 1
    return overrides


def _is_lower(field: str, own: Any, limit: Any) -> bool:
    is_limit = field.startswith("max_") or field in LIMITS
    return is_limit and isinstance(own, int | float) and not isinstance(own, bool) and 0 < own < limit
