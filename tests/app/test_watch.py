"""What the page shows of a rollout is what the trainers compute."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from pipeline.app import rollout, watch
from pipeline.app.losses import CISPO_CLIP, LOSSES, explain_first_update, loss_name, with_loss
from pipeline.app.models import Models
from pipeline.app.site import Site
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools.dialogue import Dialogue

PROMPT = [{"role": "user", "content": "What is 12?"}]
ANSWERS = ("7", "12", "no", "5", "3")


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


def answers_of(tokenizer: Any) -> list[list[int]]:
    """Return the tokens of five answers, of which the second is right."""
    texts = [f"The answer is {text}." for text in ANSWERS]
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def watch_answers(run: Path, models: Models | None = None, updates: int = 1, **changes: Any) -> Any:
    """Watch these answers."""
    models = models or Models(run)
    policy, reference = models.get("4_grpo"), models.get("3_ppo")
    settings = watch.stage_settings(run, "4_grpo") | changes
    group = [Dialogue(policy.encode(PROMPT), {}, ids, [1] * len(ids)) for ids in answers_of(policy.tokenizer)]
    weights = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    row = {"prompt": PROMPT, "answer": "12"}
    update = watch.update(policy, reference, settings, row, group, updates)
    assert all(torch.equal(weights[name], weight) for name, weight in policy.model.state_dict().items())
    return update


def test_grpo_shows_trls_rewards_and_advantages_and_an_update_that_follows_them(run: Path) -> None:
    update = watch_answers(run, reward_weights=[2.0])
    assert update.rewards == {"exact_answer": [0.0, 1.0, 0.0, 0.0, 0.0]} and update.totals == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert update.advantages == pytest.approx([-0.447, 1.789, -0.447, -0.447, -0.447], abs=1e-3)
    assert update.changes[1] > 1 and update.changes[1] == max(update.changes)


def test_grpo_shows_the_stages_own_settings(run: Path) -> None:
    """How advantages are scaled, and a step that is so held to the reference that it goes to it."""
    assert watch_answers(run, scale_rewards="none").advantages == pytest.approx([-0.2, 0.8, -0.2, -0.2, -0.2])
    assert watch_answers(run, learning_rate=0.0).changes == pytest.approx([1.0] * 5, abs=1e-4)
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


@contextmanager
def recorded_losses() -> Iterator[list[dict[str, Any]]]:
    """Record the local variables of TRL's `_compute_loss` when it returns, with `pushes`: minus the gradient."""
    calls: list[dict[str, Any]] = []

    def record(frame: Any, event: str, result: Any) -> None:
        if event == "return" and frame.f_code is TRLGRPOTrainer._compute_loss.__code__:
            names = dict(frame.f_locals)
            (gradient,) = torch.autograd.grad(result, names["per_token_logps"], retain_graph=True)
            calls.append(names | {"pushes": -gradient})

    sys.setprofile(record)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def train_with_trl(run: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Take four updates of TRL's own trainer with the answers that `watch_answers` watches. Return what it computed."""
    tokenizer = AutoTokenizer.from_pretrained(run / "4_grpo")
    completions = answers_of(tokenizer)

    def roll_out(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"prompt_ids": encoded, "completion_ids": completions, "logprobs": None}

    config = GRPOConfig(
        str(folder), max_completion_length=8, num_generations=5, per_device_train_batch_size=5, num_iterations=4,
        max_steps=4, lr_scheduler_type="constant", learning_rate=1e-3, max_grad_norm=1.0, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    trainer = TRLGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(run / "4_grpo"),
        reward_funcs=lambda completions, **_: [float("12" in turns[0]["content"]) for turns in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": PROMPT}] * 5),
        processing_class=tokenizer,
        rollout_func=roll_out,
    )
    with recorded_losses() as calls:
        trainer.train()
    # TRL shuffles the completions.
    for call in calls:
        mask = call["completion_mask"].bool()
        rows = [ids[kept].tolist() for ids, kept in zip(call["completion_ids"], mask, strict=True)]
        order = torch.tensor([rows.index(completion) for completion in completions])
        for name, value in call.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                call[name] = value.detach()[order]
    return calls


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("name", LOSSES)
def test_tokens_in_four_updates_are_those_of_trls_trainer(run: Path, tmp_path: Path, name: str) -> None:
    """With every loss: log-probabilities, ratios, what is clipped, the terms of the loss, and its gradient."""
    epsilon = {"epsilon": 0.01}
    watched = watch_answers(run, updates=4, **with_loss(epsilon, name))
    if name == "cispo":
        epsilon["epsilon_high"] = CISPO_CLIP
    loss = LOSSES[name]
    calls = train_with_trl(run, tmp_path, loss_type=loss.loss_type, importance_sampling_level=loss.level, **epsilon)
    assert len(calls) == len(watched.updates) == 4 and len(watched.log_probs) == 5
    for number, (call, update) in enumerate(zip(calls, watched.updates, strict=True)):
        mask = call["mask"]
        assert torch.equal(update.learned, mask.bool())
        assert watched.log_probs[number] == approximately(call["per_token_logps"] * mask)
        assert update.ratios * mask == approximately(call["coef_1"] * mask)
        assert update.pushes * mask == approximately(call["pushes"] * mask)
        lengths = mask.sum(1, keepdim=True)
        divisors = {"grpo": 5 * lengths, "sapo": 5 * lengths, "dr_grpo": 5 * 8, "luspo": 5}
        divisor = divisors.get(loss.loss_type, mask.sum())
        assert update.terms == approximately(call["per_token_loss"] * mask / divisor)
        assert update.loss == pytest.approx(float(call["loss"]), rel=1e-4, abs=1e-6)
        assert float(update.terms.sum()) == pytest.approx(update.loss, rel=1e-4, abs=1e-6), (
            "the terms add up to the loss"
        )
        clipped = call.get("is_region_clipped", call["coef_1"] != call.get("clamped_ratios", call["coef_1"]))
        assert torch.equal(update.clipped & update.learned, clipped.expand_as(mask) & mask.bool())
        if loss.loss_type not in ("cispo", "sapo", "vespo"):
            assert torch.equal(update.clipped & update.learned, (update.pushes == 0) & update.learned)
            assert update.clipped.any() == (number > 0)
    assert not torch.equal(watched.log_probs[3], watched.log_probs[4])


def approximately(tensor: torch.Tensor) -> Any:
    """Return what a tensor is compared with: nearly the same values."""
    return pytest.approx(tensor.detach().numpy(), rel=1e-4, abs=1e-6)


def test_losses_that_the_page_calls_alike_push_alike_in_the_first_update(run: Path) -> None:
    settings = watch.stage_settings(run, "4_grpo")
    for names in (("bnpo", "dapo", "cispo", "vespo"), ("grpo", "gspo", "sapo")):
        pushes = [watch_answers(run, **with_loss(settings, name)).updates[0].pushes for name in names]
        for push in pushes[1:]:
            assert push == approximately(pushes[0])
    # TRL's `epsilon_high` is `epsilon` by default, which CISPO takes as the highest ratio.
    clipped, free = watch_answers(run, loss_type="cispo"), watch_answers(run)
    assert 5 * clipped.updates[0].pushes == approximately(free.updates[0].pushes)
    assert "every ratio is 1, and clipped at 0.2: other losses push 5 times as strongly" in explain_first_update(
        clipped.args
    )


def test_a_kl_penalty_is_in_the_loss_and_the_push_but_in_no_term(run: Path) -> None:
    free, held = watch_answers(run).updates[0], watch_answers(run, beta=0.1).updates[0]
    assert held.terms == approximately(free.terms)
    assert held.loss - free.loss > 1e-3 and float((held.pushes - free.pushes).abs().max()) > 1e-4


def test_a_ratio_beyond_delta_is_clipped(run: Path) -> None:
    options = {"epsilon": 0.01, "learning_rate": 1e-2, "updates": 4}
    free, bounded = watch_answers(run, **options), watch_answers(run, delta=1.05, **options)
    for step in bounded.updates:
        assert torch.equal(step.clipped & step.learned, (step.pushes == 0) & step.learned)
    assert any(bool((step.ratios > 1.05)[[0, 2, 3, 4]].any()) for step in bounded.updates), "of a negative advantage"
    assert free.updates[3].clipped.sum() != bounded.updates[3].clipped.sum()


def test_settings_of_another_loss_only_differ_in_the_loss() -> None:
    settings = {"loss_type": "cispo", "epsilon": 0.2, "epsilon_high": 4.0, "learning_rate": 1e-3}
    assert loss_name(settings) == "cispo" and loss_name({}) == "dapo"
    assert with_loss(settings, "") == with_loss(settings, "cispo") == settings, "the settings of the run"
    changed = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": None}
    assert with_loss(settings, "gspo") == settings | changed, "a ratio of 5 would not be clipped"
    assert with_loss({"epsilon_high": 0.28}, "cispo")["epsilon_high"] == CISPO_CLIP
    assert with_loss({"epsilon_high": 0.28}, "bnpo")["epsilon_high"] == 0.28
    assert loss_name({"importance_sampling_level": "sequence"}) == "dapo with a ratio for each sequence"


def test_the_page_gets_the_numbers_of_the_same_completions(run: Path, site_of: Callable[..., Site]) -> None:
    site = site_of(run)
    options = {"stage": "4_grpo", "policy": "3_ppo", "text": "What is 12?", "answer": "12", "seed": 3}
    *_, event = rollout.roll_out(site, rollout.RolloutRequest(**options))
    assert event["step"] == "inside" and event["losses"][0] == ["", "dapo, as in the run"]
    assert sorted(name or "dapo" for name, _ in event["losses"]) == sorted(LOSSES)
    number = sum(map(len, event["tokens"]))
    assert event["formula"] == f"−min(r × A, clip(r, 0.8, 1.2) × A) ÷ {number}"
    request = rollout.RolloutRequest(**options, loss="dr_grpo", updates=3)
    (again,) = rollout.roll_out(site, request, again=True)
    assert again["tokens"] == event["tokens"] and again["advantages"] == event["advantages"]
    assert again["formula"].endswith("÷ (4 × 8)") and len(again["updates"]) == 3
    for update in again["updates"]:
        for name in ("logProbs", "newLogProbs", "ratios", "clipped", "terms", "pushes"):
            assert [len(values) for values in update[name]] == [len(tokens) for tokens in event["tokens"]]
    for earlier, later in zip(again["updates"], again["updates"][1:], strict=False):
        assert later["logProbs"] == earlier["newLogProbs"]


def test_tokens_that_nothing_is_learned_from_have_no_numbers(run: Path, site_of: Callable[..., Site]) -> None:
    """Here, completions that were cut off are left out of the loss."""
    site = site_of(run)
    request = rollout.RolloutRequest(stage="4_grpo", policy="3_ppo", text="What is 12?", answer="12", seed=3)
    policy, row = site.models.get("3_ppo"), {"prompt": PROMPT, "answer": "12"}
    settings = watch.stage_settings(run, "4_grpo") | {"mask_truncated_completions": True}
    group = rollout.sample_group(policy, row, settings, request)
    ended = Dialogue(group[0].prompt, {}, [5, policy.tokenizer.eos_token_id], [1, 1])
    group = [ended, *group[1:]]
    update = watch.update(policy, policy, settings, row, group)
    event = rollout._inside_event(policy, settings, request, group, update)
    for name in ("logProbs", "ratios", "terms", "pushes"):
        values = event["updates"][0][name]
        assert None not in values[0] and {value for row in values[1:] for value in row} == {None}


@pytest.mark.parametrize(
    ("stage", "changes", "line"),
    [
        ("4_grpo", {}, "answer: nothing: the reward exact_answer compares with it; type the right result"),
        (
            "4_grpo",
            {"reward_funcs": ["code_tests"]},
            "reward_funcs: code_tests: requires the column test, which a typed prompt lacks; choose a held-out prompt",
        ),
        (
            "3_ppo",
            {"reward_funcs": ["exact_answer"]},
            "answer: nothing: the reward exact_answer compares with it; type the right result",
        ),
    ],
)
def test_a_typed_prompt_that_lacks_what_a_reward_requires_is_one_line(
    run: Path,
    site_of: Callable[..., Site],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    changes: dict[str, Any],
    line: str,
) -> None:
    settings = watch.stage_settings(run, stage) | changes
    monkeypatch.setattr(watch, "stage_settings", lambda *_: settings)
    request = rollout.RolloutRequest(stage=stage, policy="2_sft", text="What is 99?")
    *_, event = rollout.roll_out(site_of(run), request)
    assert event == {"failed": line}


def test_a_result_that_nothing_can_be_compared_with_does_not_fill_the_terminal(
    run: Path, site_of: Callable[..., Site], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """TRL warns of rows that no reward function has an opinion on, and repeats them whole."""
    options = {"stage": "4_grpo", "policy": "3_ppo", "text": "What is 99?"}
    *_, event = rollout.roll_out(site_of(run), rollout.RolloutRequest(**options, answer="9" * 3000))
    assert event["step"] == "inside"
    assert "999" not in caplog.text + "".join(capfd.readouterr())
    with pytest.raises(ValidationError):
        rollout.RolloutRequest(**options, answer="9" * 100_000)
