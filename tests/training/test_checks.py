"""Checks of the training arguments that no refused command line shows: what they accept, and the model's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from trl import GRPOConfig

from pipeline.training.checks import check_generation_config, preflight


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig("-", bf16=False, use_cpu=True, report_to="none", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"generation_kwargs": {"use_cache": True, "cache_implementation": "static"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"temperature": 0.7, "min_p": 0.0},
    ],
    ids=str,
)
def test_what_training_sees_is_accepted(changes: dict[str, Any]) -> None:
    assert preflight(config(**changes)) == []


def test_vllm_corrects_what_training_does_not_see() -> None:
    filtered = {"use_vllm": True, "top_p": 0.9, "generation_kwargs": {"presence_penalty": 1.0}}
    assert preflight(config(**filtered)) == []
    uncorrected = preflight(config(**filtered, vllm_importance_sampling_correction=False))
    assert [problem.field for problem in uncorrected] == ["top_p", "generation_kwargs"]


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}, []),
        ({"eos_token_id": [1, 2], "pad_token_id": 3, "max_length": 100}, []),
        ({"output_attentions": False, "num_beams": 1, "typical_p": 1.0, "min_length": 0, "do_sample": True}, []),
        ({"no_repeat_ngram_size": 3, "do_sample": True}, ["no_repeat_ngram_size"]),
        ({"min_p": 0.1, "suppress_tokens": [5], "do_sample": True}, ["min_p", "suppress_tokens"]),
    ],
    ids=str,
)
def test_a_models_own_options_of_generation(tmp_path: Path, saved: dict[str, Any], refused: list[str]) -> None:
    assert check_generation_config(str(tmp_path), None) == []  # the file is optional
    GenerationConfig(**saved).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()).items() >= saved.items()
    problems = check_generation_config(str(tmp_path), None)
    assert [problem.field for problem in problems] == ["model_name_or_path"] * bool(refused)
    assert all(f"'{name}'" in problems[0].remedy for name in refused)
