"""GRPO in one file, against `GRPOTrainer`, on the same completions of the same model."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trl import GRPOConfig

from lessons import grpo_loop
from lessons.grpo_loop import Settings
from lessons.ppo_loop import Rollout, log_probs
from pipeline.config.yaml_file import read_yaml
from pipeline.rl.grpo import GRPOTrainer
from tests.helpers import ppo_toy as toy

ROOT = Path(__file__).parents[2]
VARIANTS = [("dapo", "group"), ("grpo", "group"), ("dr_grpo", "none")]


@dataclass
class Update:
    """An update of the trainer: the policy before it, what it was trained on, and what came of it."""

    policy: nn.Module
    inputs: dict[str, Tensor]
    loss: float = 0.0
    gradients: tuple[Tensor, ...] = ()


def gradients(model: nn.Module) -> tuple[Tensor, ...]:
    return tuple(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)


def plain_copy(policy: nn.Module) -> nn.Module:
    """Copy a policy of the trainer, without its faster forward pass, into one that has no dropout."""
    plain = toy.policy().eval()
    plain.load_state_dict(policy.state_dict())
    return plain


class Recorder(GRPOTrainer):
    """A trainer that keeps its rollouts, each group's completions in a row, and its updates, which shuffle them."""

    rollouts: list[dict[str, Tensor]]
    updates: list[Update]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rollout = super()._generate_and_score_completions(inputs)
        self.rollouts.append(dict(rollout))
        return rollout

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.updates[-1].loss = loss.item()
        self.updates[-1].gradients = gradients(self.model)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.updates.append(Update(plain_copy(self.model), dict(inputs)))
        return super().compute_loss(model, inputs, *args, **kwargs)


def share_of_red(answers: Sequence[str], references: Sequence[Any]) -> list[float]:
    return toy.share_of_red([[{"content": answer}] for answer in answers])


def settings_of(loss_type: str = "dapo", scale_rewards: str = "group") -> Settings:
    return Settings(
        steps=2,
        prompts=4,
        num_generations=8,
        updates=2,
        max_new_tokens=6,
        learning_rate=1e-2,
        warmup_steps=2,
        max_grad_norm=0.1,
        cliprange=0.02,
        scale_rewards=scale_rewards,
        loss_type=loss_type,
    )


def recorder(path: Path, settings: Settings) -> Recorder:
    """Return a trainer after two rollouts, each trained on twice, with completions that end and some that do not."""
    config = GRPOConfig(
        output_dir=str(path),
        per_device_train_batch_size=settings.prompts * settings.num_generations,
        num_generations=settings.num_generations,
        num_iterations=settings.updates,
        max_completion_length=settings.max_new_tokens,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        epsilon=settings.cliprange,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        max_steps=settings.steps * settings.updates,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Recorder(toy.policy(), toy.share_of_red, config, toy.prompts(), processing_class=toy.tokenizer())
    trainer.rollouts = []
    trainer.updates = []
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "-".join(variant))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, Settings]:
    settings = settings_of(*request.param)
    return recorder(tmp_path_factory.mktemp("grpo"), settings), settings


def rollout_of(inputs: dict[str, Tensor]) -> Rollout:
    """Return what the trainer worked out for its completions, in the form of the lesson."""
    mask = inputs["completion_mask"]
    nothing = torch.zeros(mask.shape)
    return Rollout(
        ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        attention=torch.cat([inputs["prompt_mask"], mask], dim=1),
        mask=mask,
        logps=inputs["old_per_token_logps"],
        values=nothing,
        advantages=inputs["advantages"][:, None].expand(mask.shape),
        returns=nothing,
    )


def without_judgement(rollout: Rollout) -> Rollout:
    nothing = torch.zeros(rollout.mask.shape)
    return Rollout(rollout.ids, rollout.attention, rollout.mask, nothing, nothing, nothing, nothing)


def test_settings_are_those_of_the_recipe() -> None:
    recipe = read_yaml(str(ROOT / "recipes" / "pocket" / "4_grpo.yaml"))
    settings = Settings()
    assert settings.steps == recipe["max_steps"]
    assert settings.prompts * settings.num_generations == recipe["per_device_train_batch_size"]
    assert settings.max_new_tokens == recipe["max_completion_length"]
    for name in ("num_generations", "learning_rate", "warmup_steps"):
        assert getattr(settings, name) == recipe[name]
    defaults = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True)
    assert settings.updates == recipe.get("num_iterations", defaults.num_iterations)
    assert settings.cliprange == recipe.get("epsilon", defaults.epsilon)
    for name in ("max_grad_norm", "scale_rewards", "loss_type"):
        assert getattr(settings, name) == recipe.get(name, getattr(defaults, name))


def test_a_rollout_is_judged_as_the_trainer_does(run: tuple[Recorder, Settings]) -> None:
    trainer, settings = run
    expected = rollout_of(trainer.rollouts[1])
    policy = trainer.updates[settings.updates].policy
    tokenizer = toy.tokenizer()
    references = [None] * len(expected.ids)
    judged, rewards = grpo_loop.judge(
        without_judgement(expected), policy, tokenizer, references, share_of_red, settings
    )
    torch.testing.assert_close(rewards, trainer.all_rewards[:, 0])
    torch.testing.assert_close(judged.advantages, expected.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judged.logps * judged.mask, expected.logps * judged.mask, rtol=1e-4, atol=1e-5)
    is_cut_off = (expected.ids[:, -expected.mask.shape[1] :] != tokenizer.eos_token_id).all(1)
    is_cut_off &= expected.mask.all(1)
    assert expected.advantages[is_cut_off].any(), "nothing is learned from a completion that does not end"
    assert expected.advantages[~is_cut_off].any(), "nothing is learned from a completion that ends"


def test_an_update_has_the_loss_and_the_gradients_of_the_trainer(run: tuple[Recorder, Settings]) -> None:
    trainer, settings = run
    update = trainer.updates[3]
    batch = rollout_of(update.inputs)
    ratio = (log_probs(update.policy, batch.ids, batch.attention, batch.mask.shape[1]) - batch.logps).exp()
    is_clipped = ((ratio - 1) * batch.advantages.sign() > settings.cliprange) * batch.mask
    assert is_clipped.any(), "no ratio is clipped"
    loss = grpo_loop.loss(update.policy, batch, settings)
    assert loss.item() == pytest.approx(update.loss, rel=1e-4, abs=1e-6)
    update.policy.zero_grad()
    loss.backward()
    for gradient, expected in zip(gradients(update.policy), update.gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_the_loop_trains_as_the_trainer_does_on_its_completions(
    run: tuple[Recorder, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With warm-up and clipped gradients: the first update changes nothing, the second one is half as large."""
    trainer, settings = run
    rollouts = iter(trainer.rollouts)
    prompts: list[list[str]] = []

    def recorded_sample(policy: Any, tokenizer: Any, texts: list[str], tokens: int) -> Rollout:
        prompts.append(texts)
        return without_judgement(rollout_of(next(rollouts)))

    monkeypatch.setattr(grpo_loop, "sample", recorded_sample)
    policy = toy.policy().eval()
    problems = iter([(str(number), None) for number in range(8)])
    grpo_loop.train(policy, toy.tokenizer(), problems, share_of_red, settings)
    assert prompts == [[str(number) for number in numbers for _ in range(8)] for numbers in (range(4), range(4, 8))]
    moved = 0.0
    states = (policy.state_dict(), plain_copy(trainer.model).state_dict(), toy.policy().state_dict())
    for weight, expected, initial in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
        moved = max(moved, (expected - initial).abs().max().item())
    assert moved > settings.learning_rate


def test_nothing_is_learned_from_a_group_of_equal_rewards() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert not grpo_loop.group_advantages(rewards, num_generations=3).any()


def test_the_loop_learns_a_word_that_is_rewarded() -> None:
    tokenizer, prompt = toy.tokenizer(), "<user> green <assistant>"
    policy = toy.policy().eval()
    untrained = copy.deepcopy(policy)
    settings = Settings(steps=20, prompts=4, num_generations=8, max_new_tokens=4, learning_rate=1e-2)

    def mean_reward(policy: Any) -> float:
        torch.manual_seed(1)
        rollout = grpo_loop.sample(policy, tokenizer, [prompt] * 256, tokens=4)
        answers = tokenizer.batch_decode(rollout.ids[:, -rollout.mask.shape[1] :], skip_special_tokens=True)
        return sum(share_of_red(answers, answers)) / len(answers)

    torch.manual_seed(0)
    grpo_loop.train(policy, tokenizer, itertools.repeat((prompt, None)), share_of_red, settings)
    assert mean_reward(untrained) < 0.2
    assert mean_reward(policy) > 0.9
