"""What the PPO recipe takes rewards from, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import LlamaForSequenceClassification
from trl import ModelConfig

from pipeline.arguments import DataArguments, parse
from pipeline.errors import UserError
from pipeline.ppo_config import PPOConfig
from pipeline.reward_sources import RewardArguments, load_ppo_inputs, load_reward_sources
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


def test_prompts_policy_and_rewards_are_told_about_together(tmp_path: Path) -> None:
    for name, model in (("policy", toy.policy()), ("reward", toy.reward_model())):
        model.save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
    toy.prompts(8).to_json(tmp_path / "prompts.jsonl")
    good = ["--model_name_or_path", str(tmp_path / "policy"), "--dataset_name", str(tmp_path / "prompts.jsonl")]
    good += ["--reward_model_path", str(tmp_path / "reward"), "--output_dir", str(tmp_path / "run")]
    good += ["--per_device_train_batch_size", "4", "--max_completion_length", "6"]
    kinds = (DataArguments, RewardArguments, PPOConfig, ModelConfig)

    def load(*more: str) -> list[str]:
        data_args, reward_args, training_args, model_args = parse(*kinds, argv=[*good, *more])
        try:
            load_ppo_inputs(reward_args, data_args, training_args, model_args)
        except UserError as error:
            return [str(problem) for problem in error.problems]
        return []

    assert load() == []
    os.truncate(tmp_path / "reward" / "model.safetensors", 100)
    lora = ("--use_peft", "--lora_target_modules", "qkv", "proj")
    told = load("--value_model_path", str(tmp_path / "no"), "--max_completion_length", "64", *lora)
    fields = ["reward_model_path", "value_model_path", "lora_target_modules", "max_completion_length"]
    assert [line.split(":")[0] for line in told] == fields
    assert "damaged" in told[0] and "leaves" in told[3]
