"""What `docs/grpo.md` says of the variants of GRPO: which are the same, and what each changes in the gradient."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from trl import GRPOConfig

from pipeline.rl.grpo import GRPOTrainer
from tests.helpers import ppo_toy as toy
from tests.helpers.small_model import ROOT
from tests.rl.test_grpo import trainer

Batch = dict[str, Any]

VARIANTS: Mapping[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "sapo": {"loss_type": "sapo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "dr_grpo": {"loss_type": "dr_grpo"},
}
"""Variant -> attributes of the trainer."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer with a rollout of four groups, whose completions differ in length."""
    run = trainer(tmp_path_factory.mktemp("run"), rewards=red_or_long, per_device_train_batch_size=16)
    with torch.no_grad():
        # Otherwise, hardly a completion of so small a model ends before the limit.
        run.model.lm_head.weight[run.processing_class.eos_token_id] += 0.5
    run.model.train()
    return run


@pytest.fixture(scope="module")
def batch(policy: Any) -> Batch:
    torch.manual_seed(0)
    sampled = sample_rollout(policy)
    lengths = sampled["completion_mask"].sum(1)
    assert len(lengths.unique()) > 1 and len(sampled["advantages"].unique()) > 2
    return sampled


def red_or_long(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward: rewards that differ within most groups."""
    return [toy.share_of_red([each])[0] + len(each[0]["content"].split()) % 2 for each in completions]


def sample_rollout(run: Any) -> Batch:
    """Return a rollout with the log-probabilities with which it was sampled."""
    rows = [dict(run.train_dataset[number // 4]) for number in range(16)]
    return dict(run._generate_and_score_completions(rows))


def log_probs(run: Any, batch: Batch) -> Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return run._get_per_token_logps_and_entropies(run.model, ids, mask, batch["completion_ids"].shape[1])[0]


def gradient(run: GRPOTrainer, batch: Batch, name: str) -> Tensor:
    """Return the gradient of a variant's loss, as a vector."""
    settings = {"importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2} | VARIANTS[name]
    for attribute, value in settings.items():
        setattr(run, attribute, value)
    run.args.loss_type = settings["loss_type"]
    run.current_gradient_accumulation_steps = run.args.steps_per_generation = 1
    run.model.zero_grad()
    run._compute_loss(run.model, batch).backward()
    return gradient_of(run.model)


def gradient_of(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def distance(first: Tensor, second: Tensor) -> float:
    """Return the size of the difference of two gradients, as a share of the first."""
    return ((first - second).norm() / first.norm()).item()


@pytest.mark.parametrize(
    "same", [("grpo", "gspo", "sapo"), ("dapo", "bnpo", "cispo")], ids=["per_completion", "per_token"]
)
def test_variants_that_differ_by_the_ratio_are_the_same_at_the_first_update(
    policy: Any, batch: Batch, same: tuple[str, ...]
) -> None:
    first, *others = (gradient(policy, batch, name) for name in same)
    for other in others:
        assert distance(first, other) < 1e-6


def test_variants_that_differ_by_their_divisor_are_not_the_same(policy: Any, batch: Batch) -> None:
    assert distance(gradient(policy, batch, "grpo"), gradient(policy, batch, "dapo")) > 0.01


def test_dr_grpo_divides_by_the_longest_length_where_dapo_divides_by_the_real_one(policy: Any, batch: Batch) -> None:
    tokens = batch["completion_mask"].sum()
    share = tokens / (len(batch["completion_mask"]) * policy.max_completion_length)
    assert share < 1
    assert distance(gradient(policy, batch, "dr_grpo"), share * gradient(policy, batch, "dapo")) < 1e-6


def test_without_scaling_dr_grpo_has_the_gradient_of_rloo(policy: Any) -> None:
    """RLOO's baseline is the mean of the others, so its advantages are n / (n - 1) times those of Dr. GRPO."""
    policy.scale_rewards = "none"
    torch.manual_seed(1)
    batch = sample_rollout(policy)
    policy.scale_rewards = "group"
    rewards = policy.all_rewards[:, 0].view(-1, 4)
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    advantages = (rewards - others).flatten()
    assert torch.allclose(batch["advantages"], advantages * 3 / 4, atol=1e-6)

    # REINFORCE: the log-probability of the whole completion, times its advantage.
    policy.model.zero_grad()
    sums = (log_probs(policy, batch) * batch["completion_mask"]).sum(1)
    (-(advantages * sums).mean()).backward()
    rloo = gradient_of(policy.model)
    assert distance(rloo, gradient(policy, batch, "dr_grpo") * policy.max_completion_length * 4 / 3) < 1e-6


def test_gdpo_normalises_each_reward_before_it_sums_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.2]}
    run = trainer(tmp_path, rewards=[red_or_long, toy.share_of_red], per_device_train_batch_size=16, **options)
    run.model.train()
    batch = sample_rollout(run)
    rewards = run.all_rewards.view(4, 4, 2)
    normalised = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    total = (normalised * torch.tensor([1.0, 0.2])).sum(2).flatten()
    assert torch.allclose(batch["advantages"], (total - total.mean()) / (total.std() + 1e-4), atol=1e-5)


def test_after_an_update_only_bnpo_is_still_dapo(policy: Any, batch: Batch) -> None:
    sampled = batch | {"old_per_token_logps": log_probs(policy, batch).detach()}
    state = {name: value.clone() for name, value in policy.model.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(2)
        for parameter in policy.model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    gradients = {name: gradient(policy, sampled, name) for name in VARIANTS}
    policy.model.load_state_dict(state)
    assert distance(gradients["dapo"], gradients["bnpo"]) < 1e-6
    for name, other in [("grpo", "gspo"), ("grpo", "sapo"), ("gspo", "sapo"), ("dapo", "cispo")]:
        assert distance(gradients[name], gradients[other]) > 0.01, (name, other)


def test_updates_on_the_same_rollout_count_as_steps(tmp_path: Path) -> None:
    """So that four updates need four times the `max_steps` for as many completions, to the same prompts."""
    questions: dict[int, list[str]] = {1: [], 4: []}
    for updates, texts in questions.items():

        def remember(
            completions: list[Any], prompts: list[Any], texts: list[str] = texts, **kwargs: Any
        ) -> list[float]:
            texts.extend(prompt[0]["content"] for prompt in prompts)
            return toy.share_of_red(completions)

        options: dict[str, Any] = {"steps_per_generation": 1, "num_iterations": updates, "max_steps": 3 * updates}
        run = trainer(tmp_path / str(updates), rewards=remember, save_strategy="no", **options)
        run.train()
    assert len(questions[1]) == 3 * 4
    assert questions[1] == questions[4]


def test_the_lines_of_the_page_are_accepted(tmp_path: Path) -> None:
    table = (ROOT / "docs/grpo.md").read_text(encoding="utf-8").split("## YAML")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 9
    for row in rows:
        settings: dict[str, Any] = {}
        for line in re.findall(r"`(\w+: \S+)`", row):
            settings |= yaml.safe_load(line)
        args = GRPOConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **settings)
        assert settings and all(getattr(args, name) == value for name, value in settings.items()), row
