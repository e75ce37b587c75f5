"""PPO in one file, against `PPOTrainer`, on the same completions of the same models."""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from lessons import ppo_loop
from lessons.ppo_loop import Rollout, Settings
from pipeline.rl.ppo import PPOTrainer
from tests.helpers import ppo_toy as toy

SETTINGS = Settings(kl_coef=0.25, missing_eos_penalty=1.0, lam=0.9, vf_coef=0.3)


@dataclass
class Update:
    """An update of the trainer: the two networks before it, what they were trained on, and what came of it."""

    policy: nn.Module
    critic: nn.Module
    inputs: dict[str, Tensor]
    loss: float = 0.0
    policy_gradients: tuple[Tensor, ...] = ()
    critic_gradients: tuple[Tensor, ...] = ()


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)


class Recorder(PPOTrainer):
    """A trainer that keeps its updates."""

    updates: list[Update]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        step = self.critic.step

        def recorded_step(share: float) -> float:
            self.updates[-1].critic_gradients = gradients(self.value_model)
            return step(share)

        self.critic.step = recorded_step
        loss = super().training_step(*args, **kwargs)
        self.critic.step = step
        self.updates[-1].loss = loss.item()
        self.updates[-1].policy_gradients = gradients(self.model)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # Copies of the trainer's own models would compute with their faster forward passes.
        policy = toy.policy().eval()
        policy.load_state_dict(self.model.state_dict())
        critic = AutoModelForTokenClassification.from_config(self.value_model.config).eval()
        critic.load_state_dict(self.value_model.state_dict())
        self.updates.append(Update(policy, critic, dict(inputs)))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """A trainer after two rollouts, each trained on twice, with completions that end and some that do not."""
    config = toy.config(
        tmp_path_factory.mktemp("ppo"),
        kl_coef=SETTINGS.kl_coef,
        missing_eos_penalty=SETTINGS.missing_eos_penalty,
        lam=SETTINGS.lam,
        vf_coef=SETTINGS.vf_coef,
        num_iterations=2,
        learning_rate=5e-2,
        max_steps=4,
        # The reward model of the trainer reads special tokens in a completion as text, so that it cannot forge a turn.
        generation_kwargs={"suppress_tokens": [0, 1, 3, 4]},
    )
    recorder = Recorder(
        toy.policy(),
        toy.reward_model(),
        config,
        toy.prompts(),
        processing_class=toy.tokenizer(),
        reward_processing_classes=toy.tokenizer(),
    )
    recorder.updates = []
    recorder.train()
    return recorder


def rollout_of(inputs: dict[str, Tensor]) -> Rollout:
    """Return what the trainer worked out for its completions, in the form of the lesson."""
    return Rollout(
        ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        attention=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        mask=inputs["completion_mask"],
        logps=inputs["old_per_token_logps"],
        values=inputs["old_values"],
        advantages=inputs["advantages"],
        returns=inputs["returns"],
    )


def test_a_rollout_is_judged_as_the_trainer_does(trainer: Recorder) -> None:
    update = trainer.updates[2]
    expected = rollout_of(update.inputs)
    models = {
        "policy": update.policy,
        "critic": update.critic,
        "reward": toy.reward_model().eval(),
        "reference": toy.policy().eval(),
    }
    sampled = Rollout(expected.ids, expected.attention, expected.mask, *[torch.zeros(expected.mask.shape)] * 4)
    judged, figures = ppo_loop.judge(sampled, models, toy.tokenizer().eos_token_id, SETTINGS)
    lengths = expected.mask.sum(1)
    assert lengths.min() < expected.mask.shape[1], "no completion ends early"
    assert abs(figures["kl"]) > 0.01, "the policy is the reference, so that the penalty was not tested"
    for name in ("logps", "values", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(judged, name) * expected.mask, getattr(expected, name) * expected.mask, rtol=1e-4, atol=1e-5
        )


def test_an_update_has_the_losses_and_gradients_of_the_trainer(trainer: Recorder) -> None:
    update = trainer.updates[3]
    batch = rollout_of(update.inputs)
    ratio = (ppo_loop.log_probs(update.policy, batch.ids, batch.attention, batch.mask.shape[1]) - batch.logps).exp()
    assert ((ratio - 1).abs() > SETTINGS.cliprange).any(), "no ratio is clipped"
    of_policy, of_critic = ppo_loop.losses(update.policy, update.critic, batch, batch.mask.sum().item(), SETTINGS)
    assert (of_policy + of_critic).item() == pytest.approx(update.loss, rel=1e-4, abs=1e-5)
    update.policy.zero_grad()
    update.critic.zero_grad()
    (of_policy + of_critic).backward()
    for model, expected in ((update.policy, update.policy_gradients), (update.critic, update.critic_gradients)):
        for gradient, other in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


def test_sampled_completions_are_masked_after_their_end() -> None:
    tokenizer = toy.tokenizer()
    torch.manual_seed(0)
    prompts = ["<user> red <assistant>", "<user> red green blue <assistant>"] * 32
    rollout = ppo_loop.sample(toy.policy().eval(), tokenizer, prompts, tokens=6)
    completions = rollout.ids[:, -rollout.mask.shape[1] :]
    assert rollout.mask[:, 0].all(), "the first token is always the policy's choice"
    for row, mask in zip(completions.tolist(), rollout.mask.tolist(), strict=True):
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        assert mask == [1] * length + [0] * (len(row) - length)


def test_the_loop_learns_to_end_its_turn_where_only_that_is_rewarded() -> None:
    tokenizer, prompt = toy.tokenizer(), "<user> red <assistant>"
    policy = toy.policy().eval()
    critic = AutoModelForTokenClassification.from_config(toy.llama_config(num_labels=1)).eval()
    reward = toy.end_detector().eval()
    models = {"policy": policy, "critic": critic, "reward": reward, "reference": copy.deepcopy(policy)}
    settings = Settings(
        rollouts=12,
        completions=32,
        batch_size=16,
        max_new_tokens=4,
        learning_rate=1e-2,
        value_learning_rate=1e-2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
    )

    def share_of_ends() -> float:
        torch.manual_seed(1)
        rollout = ppo_loop.sample(policy, tokenizer, [prompt] * 256, tokens=4)
        return (rollout.ids[:, -rollout.mask.shape[1] :] == tokenizer.eos_token_id).any(1).float().mean().item()

    assert share_of_ends() < 0.6
    torch.manual_seed(0)
    ppo_loop.train(models, tokenizer, itertools.repeat(prompt), settings)
    assert share_of_ends() > 0.9
