"""What `--smoke` changes in the settings of a step: it takes two steps on a miniature of its model and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.stages import STAGES

EVALUATION: Mapping[str, Any] = {"limit": 8, "max_new_tokens": 16}
"""What is changed in the settings of evaluations; `STAGES` has what is changed in those of the other steps."""

LIMITS = ("size_mb", "block_size", "min_votes", "vocab_size", "sft_rows", "preference_rows", "reasoning_rows", "limit")
"""Limits, besides the fields that begin with `max_`. A recipe's own value is kept if it is lower."""


def smoke_overrides(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a step's smoke run overrides, and their values.

    Args:
        kind: Kind of the step, such as "sft", or "evaluate".
        values: Content of the step's YAML file.
    """
    limits = EVALUATION if kind == "evaluate" else STAGES[kind].smoke
    overrides = {field: value for field, value in limits.items() if not _is_lower(field, values.get(field), value)}
    if kind != "evaluate" and STAGES[kind].samples and STAGES[kind].measured:
        # TRL refuses a configuration with both of these fields.
        if "generation_batch_size" in values:
            overrides["generation_batch_size"] = limits["per_device_train_batch_size"]
        else:
            overrides["steps_per_generation"] = 1
    return overrides


def _is_lower(field: str, own: Any, limit: Any) -> bool:
    is_limit = field.startswith("max_") or field in LIMITS
    return is_limit and isinstance(own, int | float) and not isinstance(own, bool) and 0 < own < limit
