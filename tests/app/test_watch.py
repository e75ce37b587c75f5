"""What the page shows of a rollout is what the trainers compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.app import watch
from pipeline.app.models import Models
from pipeline.rl import ppo_math
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig

PROMPT = [{"role": "user", "content": "What is 12?"}]


def test_ppo_shows_what_the_trainer_computes(run: Path, tmp_path: Path) -> None:
    settings = watch.stage_settings(run, "3_ppo")
    assert settings["reward_model_path"] == [str(run / "3_reward")], "the run was moved"
    models = Models(run)
    policy, reference = models.get("3_ppo"), models.get("2_sft")
    ids = policy.encode(PROMPT)
    (completion,), batch = watch.sample_group(policy, ids, settings, 1, seed=3)
    view = watch.token_view(policy, reference, run, "3_ppo", settings, PROMPT, completion, batch)

    config = PPOConfig(
        str(tmp_path), kl_coef=0.5, lam=0.9, missing_eos_penalty=1.0, max_completion_length=8, use_cpu=True, bf16=False,
        per_device_train_batch_size=2, whiten_advantages=False, report_to="none", activation_checkpointing=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        model=str(run / "2_sft"),  # the reference is the policy as it is now
        reward_funcs=AutoModelForSequenceClassification.from_pretrained(run / "3_reward"),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 2),
        processing_class=AutoTokenizer.from_pretrained(run / "2_sft"),
        value_model=str(run / "3_ppo" / "value_model"),
    )
    trainer.model.load_state_dict(policy.model.state_dict())
    trainer._generate_single_turn = lambda prompts, *_, **__: ([completion.tokens] * len(prompts), None)
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([{"prompt": PROMPT}] * 2)
    for name, shown in (("old_per_token_logps", view.log_probs), ("old_values", view.values)):
        assert rollout[name][0].tolist() == pytest.approx(shown, abs=1e-3)
    assert rollout["advantages"][0].tolist() == pytest.approx(view.advantages, abs=2e-3)
    assert any(abs(kl) > 1e-3 for kl in view.kl)


def test_grpo_shows_trls_advantages_and_an_update_that_follows_them(run: Path) -> None:
    settings = watch.stage_settings(run, "4_grpo")
    policy = Models(run).get("4_grpo")
    group, batch = watch.sample_group(policy, policy.encode(PROMPT), settings, 4, seed=0)
    advantages = watch.group_advantages([0.0, 1.0, 0.0, 0.0], settings)
    assert advantages.tolist() == pytest.approx([-0.4998, 1.4994, -0.4998, -0.4998], abs=1e-3)
    assert watch.group_advantages([1.0, 1.0], settings).tolist() == [0.0, 0.0]
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    changes = watch.update(policy, batch, advantages, settings)
    assert changes[1] > 1 > min(changes)
    assert all(torch.equal(before[name], weight) for name, weight in policy.model.state_dict().items())
    assert ppo_math.ended(
        batch.ids[:, -batch.mask.shape[1] :], batch.mask, [policy.tokenizer.eos_token_id]
    ).tolist() == [completion.stopped for completion in group]


def test_rewards_are_those_of_the_stage(run: Path) -> None:
    settings = watch.stage_settings(run, "4_grpo") | {"reward_weights": [2.0]}
    row = watch.load_rows(settings)[3]
    group = [watch.Completion(f"The answer is {text}.", [5], True) for text in (row["answer"], "7")]
    rewards, totals = watch.check(settings, row["prompt"], group, row)
    assert rewards == {"exact_answer": [1.0, 0.0]} and totals == [2.0, 0.0]
