"""GRPO and PPO with vLLM, as far as that goes without a GPU: what they pass to an engine, and what they make of it."""

import math
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig

from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOConfig, PPOTrainer
from pipeline.training.frozen_weights import restore_frozen_weights
from tests.helpers import ppo_toy as toy
from tests.helpers.vllm_stub import LLM, SamplingParams

TRAINERS: dict[str, tuple[Any, Any]] = {"grpo": (GRPOTrainer, GRPOConfig), "ppo": (PPOTrainer, PPOConfig)}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "trl.generation.vllm_generation"
    monkeypatch.setattr(f"{place}.is_vllm_available", lambda: True)
    monkeypatch.setattr(f"{place}.LLM", LLM, raising=False)
    monkeypatch.setattr(f"{place}.SamplingParams", SamplingParams, raising=False)
    monkeypatch.setattr(LLM, "engines", [])


def run(kind: str, path: Path, lora: bool = False, resume: Path | None = None, **changes: Any) -> GRPOTrainer:
    """Train for three steps, two for each rollout."""
    trainer_class, config_class = TRAINERS[kind]
    policy = path.parent / "policy"
    if not policy.exists():
        toy.policy().save_pretrained(policy)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_generations": 2, "num_iterations": 2, "max_completion_length": 6,
        "max_steps": 3, "learning_rate": 1e-2, "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1,
        "save_steps": 1, "disable_tqdm": True, "use_vllm": True, "vllm_gpu_memory_utilization": 0.2,
        "vllm_enable_sleep_mode": True, **changes,
    }  # fmt: skip
    # TRL leaves the variables of a process group in the environment.
    with patch.dict(os.environ):
        trainer = trainer_class(
            model=str(policy),
            reward_funcs=toy.share_of_red,
            args=config_class(output_dir=str(path), **settings),
            train_dataset=toy.prompts(16),
            processing_class=toy.tokenizer(),
            peft_config=LoraConfig(r=2, init_lora_weights=False) if lora else None,
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_each_rollout_is_sampled_with_the_weights_of_its_step(kind: str, tmp_path: Path) -> None:
    trainer = run(kind, tmp_path / "run")
    (llm,) = LLM.engines
    assert (llm.settings["gpu_memory_utilization"], llm.settings["enable_sleep_mode"]) == (0.2, True)
    assert (llm.settings["logprobs_mode"], llm.settings["max_model_len"]) == ("processed_logprobs", -1)
    assert {params.max_tokens for params in llm.requests} == {6} and len(llm.requests) == 8
    assert not llm.awake, "it sleeps while the policy is trained"
    folders = (tmp_path / "policy", tmp_path / "run" / "checkpoint-2")
    for folder, sampled in zip(folders, llm.sampled_with, strict=True):
        weights = type(toy.policy()).from_pretrained(folder).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in sampled.items()), folder
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert logs[0]["sampling/sampling_logp_difference/max"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_checkpoint_contains_the_rollout(kind: str, tmp_path: Path) -> None:
    """Up to the next rollout, a resumed run is exact; what it then samples may differ."""
    whole = run(kind, tmp_path / "whole", max_steps=2)
    checkpoint = tmp_path / "resumed" / "checkpoint-1"
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", checkpoint)
    resumed = run(kind, tmp_path / "resumed", resume=checkpoint, max_steps=2)
    assert [len(llm.sampled_with) for llm in LLM.engines] == [1, 0]
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_loss_is_corrected_by_the_probabilities_of_vllm(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "sharpened", 0.5)
    options = {"max_steps": 1, "vllm_importance_sampling_mode": "token_truncate"}
    gradients = {}
    for corrected in (True, False):
        trainer = run(kind, tmp_path / str(corrected), vllm_importance_sampling_correction=corrected, **options)
        log = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
        assert ("sampling/importance_sampling_ratio/mean" in log) == corrected
        gradients[corrected] = log["grad_norm"]
        if corrected:
            assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(-0.5), abs=1e-3)
    assert gradients[True] == pytest.approx(math.exp(-0.5) * gradients[False], rel=1e-3)


def test_the_seed_of_the_run_is_that_of_its_samples(tmp_path: Path) -> None:
    """An engine in the process of training seeds the global random numbers, always alike."""
    rewards = []
    for seed in (1, 1, 2):
        trainer = run("grpo", tmp_path / f"{seed}-{len(rewards)}", max_steps=1, seed=seed, shuffle_dataset=False)
        rewards.append(trainer._logs["completion"][0][0]["content"])
    assert rewards[0] == rewards[1] != rewards[2]


def test_the_adapter_is_merged_for_sampling_alone(tmp_path: Path) -> None:
    trainer = run("ppo", tmp_path / "run", lora=True)
    (llm,) = LLM.engines
    base = toy.policy().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(llm.sampled_with[0][name], base[name])
    kept = trainer.model.get_base_model().state_dict()[name.replace("q_proj.", "q_proj.base_layer.")]
    assert torch.equal(kept, base[name]), "and rounds nothing"


def test_only_weights_that_merging_changes_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = get_peft_model(toy.policy(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    copied, to = [], torch.Tensor.to

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.extend([tensor.numel()] if kwargs.get("copy") else [])
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", count)
    with restore_frozen_weights(policy):
        policy.merge_adapter()
        policy.unmerge_adapter()
    assert copied == [weight.numel() for name, weight in before.items() if "q_proj.base_layer" in name]
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
