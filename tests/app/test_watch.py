"""What the page shows of a rollout is what the trainers compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.app import rollout, watch
from pipeline.app.models import Models
from pipeline.app.site import Site
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.dialogue import Dialogue

PROMPT = [{"role": "user", "content": "What is 12?"}]
ANSWERS = ("7", "12", "no", "5")


def test_ppo_shows_what_the_trainer_computes(run: Path, tmp_path: Path) -> None:
    # A field that earlier releases recorded.
    settings = watch.stage_settings(run, "3_ppo") | {"kl_estimator": "k1"}
    assert settings["reward_model_path"] == [str(run / "3_reward")], "the run was moved"
    models = Models(run)
    policy, reference = models.get("3_ppo"), models.get("2_sft")
    (completion,) = watch.sample_group(policy, {"prompt": PROMPT}, settings, 1, seed=3)
    weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    view = watch.token_view(policy, reference, run, "3_ppo", settings, {"prompt": PROMPT}, completion)
    assert all(torch.equal(weights[name], weight) for name, weight in policy.model.state_dict().items())

    config = PPOConfig(
        str(tmp_path), kl_coef=0.5, lam=0.9, missing_eos_penalty=1.0, max_completion_length=8, use_cpu=True, bf16=False,
        per_device_train_batch_size=2, whiten_advantages=False, report_to="none", activation_checkpointing=False,
    )  # fmt: skip
    trainer = PPOTrainer(
        # The reference is the policy as it is now.
        model=str(run / "2_sft"),
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
    for name, expected in (("old_per_token_logps", view.log_probs), ("old_values", view.values)):
        assert rollout[name][0].tolist() == pytest.approx(expected, abs=1e-3)
    assert rollout["advantages"][0].tolist() == pytest.approx(view.advantages, abs=2e-3)
    assert any(abs(kl) > 1e-3 for kl in view.kl)
    assert sum(view.rewards) == pytest.approx(view.score - view.penalty - 0.5 * sum(view.kl), abs=1e-3)


def test_the_page_says_how_ppos_advantages_come_about_and_what_its_update_does_with_them(
    run: Path, site_of: Callable[..., Site]
) -> None:
    """It said that tokens below 0 become less likely, although whitening shifts the advantages of a rollout first."""
    site = site_of(run)
    policies = {stage["name"]: stage["policy"] for stage in rollout.content(site)["stages"]}
    assert policies["3_ppo"] == "2_sft", "the model before the stage, in which there is something to change"
    request = rollout.RolloutRequest(stage="3_ppo", policy="2_sft", text="What is 12?", seed=3)
    *_, event = rollout.roll_out(site, request)
    about, columns = event["about"], event["columns"]
    assert "γ = 1 and λ = 0.9 (GAE)" in about
    assert "above that mean more likely" in about and "an advantage above 0 more likely" not in about
    advantage = following = 0.0
    for reward, value, written in zip(*map(reversed, list(columns.values())[1:]), strict=True):
        advantage = reward + following - value + 0.9 * advantage
        following = value
        assert written == pytest.approx(advantage, abs=1e-3), "as a reader computes it from the table"

    assert "4 answers" in rollout.update_of({"generation_batch_size": 4, "whiten_advantages": True})
    assert "an advantage above 0 more likely" in rollout.update_of({"whiten_advantages": False})


def watch_answers(run: Path, models: Models | None = None, **changes: Any) -> Any:
    """Watch four answers, of which the second is right."""
    models = models or Models(run)
    policy, reference = models.get("4_grpo"), models.get("3_ppo")
    settings = watch.stage_settings(run, "4_grpo") | changes
    tokenizer = policy.tokenizer
    texts = [f"The answer is {text}." for text in ANSWERS]
    tokens = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    group = [Dialogue(policy.encode(PROMPT), {}, ids, [1] * len(ids)) for ids in tokens]
    weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    row = {"prompt": PROMPT, "answer": "12"}
    update = watch.update(policy, reference, settings, row, group)
    assert all(torch.equal(weights[name], weight) for name, weight in policy.model.state_dict().items())
    return update


def test_grpo_shows_trls_rewards_and_advantages_and_an_update_that_follows_them(run: Path) -> None:
    update = watch_answers(run, reward_weights=[2.0])
    assert update.rewards == {"exact_answer": [0.0, 1.0, 0.0, 0.0]} and update.totals == [0.0, 2.0, 0.0, 0.0]
    assert update.advantages == pytest.approx([-0.5, 1.5, -0.5, -0.5], abs=1e-3)
    assert update.changes[1] > 1 and update.changes[1] == max(update.changes)


def test_grpo_shows_the_stages_own_settings(run: Path) -> None:
    """How advantages are scaled, and a step that is so held to the reference that it goes to it."""
    assert watch_answers(run, scale_rewards="none").advantages == pytest.approx([-0.25, 0.75, -0.25, -0.25])
    assert watch_answers(run, learning_rate=0.0).changes == pytest.approx([1.0] * 4, abs=1e-4)
    free, held = watch_answers(run, max_grad_norm=0.0), watch_answers(run, max_grad_norm=0.0, beta=100.0)
    assert free.changes != pytest.approx(held.changes, rel=1e-3)


def test_a_stage_that_trains_an_adapter_changes_what_its_page_shows(run: Path) -> None:
    """Also from a model whose weights are frozen, as merging another adapter leaves them."""
    options = {"use_peft": True, "lora_target_modules": "all-linear", "lora_r": 4, "lora_dropout": 0.5}
    frozen = Models(run)
    frozen.get("4_grpo").model.requires_grad_(False)
    for models in (Models(run), frozen):
        update = watch_answers(run, models, learning_rate=1e-2, **options)
        assert update.changes[1] > 1.001 and update.changes[1] == max(update.changes)
    assert watch_answers(run, frozen).changes[1] > 1.001
