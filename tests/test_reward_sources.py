"""What the PPO recipe takes rewards from, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification

from pipeline.errors import UserError
from pipeline.reward_sources import RewardArguments, load_reward_sources
from tests import ppo_toy as toy


def test_models_and_functions_in_order(tmp_path: Path) -> None:
    toy.reward_model().save_pretrained(tmp_path)
    args = RewardArguments(reward_model_path=[str(tmp_path)], reward_funcs=["tests.ppo_toy:share_of_red"])
    assert load_reward_sources(args) == [str(tmp_path), toy.share_of_red]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    LlamaForSequenceClassification(toy.llama_config(num_labels=3)).save_pretrained(tmp_path / "three")
    args = RewardArguments(
        reward_model_path=[str(tmp_path / "three"), str(tmp_path / "missing")], reward_funcs=["exact_anser"]
    )
    with pytest.raises(UserError) as refused:
        load_reward_sources(args)
    told = [str(problem) for problem in refused.value.problems]
    assert len(told) == 3
    assert "3 labels" in told[0] and str(tmp_path / "missing") in told[1] and "exact_answer" in told[2]


def test_some_reward_there_must_be() -> None:
    with pytest.raises(UserError, match="reward_funcs"):
        load_reward_sources(RewardArguments())
