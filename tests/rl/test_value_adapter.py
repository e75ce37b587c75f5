"""The critic beside a policy that is an adapter: an adapter with a value head, on weights that are in memory once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from pipeline.errors import UserError
from pipeline.models.loading import load_config
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.reward_checks import check_value_model
from tests.helpers import ppo_toy as toy
from tests.rl.test_value_model import estimate_at_the_end, reward_of, save_adapter, trainer

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model in `base`, in `adapter` a reward model that is an adapter of it, and another one in `whole`."""
    folder = tmp_path_factory.mktemp("models")
    save_adapter(folder)
    toy.reward_model().save_pretrained(folder / "whole")
    toy.tokenizer().save_pretrained(folder / "whole")
    return folder


def adapted(models: Path, folder: Path, rewards: list[Any], **given: Any) -> PPOTrainer:
    """Build a trainer whose policy is an adapter of `base`."""
    policy = AutoModelForCausalLM.from_pretrained(models / "base")
    return trainer(folder, rewards, model=policy, peft_config=LORA, **given)


def base_bytes(*networks: nn.Module) -> int:
    """Return the memory of what is neither adapter nor head in some models, which may be the same weights."""
    named = [item for network in networks for item in network.named_parameters()]
    weights = {weight.data_ptr(): weight.nbytes for name, weight in named if not is_adapter(name)}
    return sum(weights.values())


def is_adapter(name: str) -> bool:
    return "lora_" in name or "score" in name


def test_adapters_of_one_base_have_it_in_memory_once(models: Path, tmp_path: Path) -> None:
    ppo = adapted(models, tmp_path, [str(models / "adapter")])
    assert base_bytes(ppo.model, ppo.value_model, ppo.reward_funcs[0].model) == base_bytes(toy.policy())


def test_it_starts_from_the_reward_models_adapter_and_trains_that_and_the_head_alone(
    models: Path, tmp_path: Path
) -> None:
    ppo = adapted(models, tmp_path, [str(models / "adapter")])
    judge, critic = ppo.reward_funcs[0].model, ppo.value_model
    assert estimate_at_the_end(critic) == pytest.approx(reward_of(judge), abs=1e-5) and reward_of(judge) != 0
    before = {name: weight.clone() for name, weight in critic.named_parameters()}
    score = reward_of(judge)
    ppo.train()
    moved = {name for name, weight in critic.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all(map(is_adapter, moved))
    assert any("lora_" in name for name in moved) and any("score" in name for name in moved)
    assert reward_of(judge) == score, "what it shares with the reward model is not trained"


@pytest.mark.parametrize("source", ["whole reward model", "policy"])
def test_without_an_adapter_to_start_from_it_gets_a_new_one(models: Path, tmp_path: Path, source: str) -> None:
    reward: Any = toy.reward_model() if source == "whole reward model" else toy.share_of_red
    state = torch.get_rng_state()
    ppo = adapted(models, tmp_path / "a", [reward])
    expected = reward_of(reward) if source == "whole reward model" else 0.0
    assert estimate_at_the_end(ppo.value_model) == pytest.approx(expected, abs=1e-6)
    owner = ppo.reward_funcs[0].model if source == "whole reward model" else ppo.model
    assert base_bytes(ppo.value_model, owner) == base_bytes(owner)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    adapted(models, tmp_path / "b", [reward], value_use_peft=False)
    assert torch.equal(torch.get_rng_state(), after), "making it has no effect on any other random number"


@pytest.mark.parametrize("judge", ["adapter", "whole"])
def test_what_is_saved_loads_with_transformers_and_peft_and_starts_another_run(
    models: Path, tmp_path: Path, judge: str
) -> None:
    ppo = adapted(models, tmp_path / "run", [str(models / judge)])
    ppo.train()
    ppo.save_model(str(tmp_path / "run"))
    folder = str(tmp_path / "run" / "value_model")
    expected = estimate_at_the_end(ppo.value_model.eval())
    by_peft = AutoPeftModelForTokenClassification.from_pretrained(folder, num_labels=1)
    by_transformers = AutoModelForTokenClassification.from_pretrained(folder, config=load_config(folder))
    for loaded in (by_peft, by_transformers):
        assert estimate_at_the_end(loaded.eval()) == pytest.approx(expected, abs=1e-6)

    assert check_value_model(folder, toy.tokenizer()) == []
    again = adapted(models, tmp_path / "again", [toy.share_of_red], value_model=folder)
    assert estimate_at_the_end(again.value_model) == pytest.approx(expected, abs=1e-6)
    # Critic and policy share their base, unless the critic began as the reward model that has weights of its own.
    shares_base = base_bytes(again.value_model, again.model) == base_bytes(again.model)
    assert shares_base == (judge == "adapter")

    # Without an adapter for the policy, the critic is trained as a whole.
    whole = trainer(tmp_path / "whole", [toy.share_of_red], value_model=folder).value_model
    assert not isinstance(whole, PeftModel)
    assert all(weight.requires_grad for weight in whole.parameters())
    assert estimate_at_the_end(whole) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_checkpoint_with_the_other_kind_of_critic_is_refused(models: Path, tmp_path: Path, adapter: bool) -> None:
    ppo = adapted(models, tmp_path / "run", [toy.share_of_red], value_use_peft=adapter)
    ppo.save_model(str(tmp_path / "checkpoint"))
    other = adapted(models, tmp_path / "other", [toy.share_of_red], value_use_peft=not adapter)
    with pytest.raises(UserError, match=f"value_use_peft.*was trained with {str(adapter).lower()}"):
        other.critic.load(tmp_path / "checkpoint")


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_what_is_not_trained_is_in_bf16_where_training_is(models: Path, tmp_path: Path, asked: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(models / "base")
    ppo = PPOTrainer(
        policy,
        [str(models / "adapter")],
        toy.config(tmp_path, bf16=True, frozen_dtype=asked, max_steps=1, kl_coef=0.1),
        toy.prompts(),
        processing_class=toy.tokenizer(),
        reward_processing_classes=[toy.tokenizer()],
        peft_config=LORA,
    )
    judge, critic = ppo.reward_funcs[0].model, ppo.value_model
    # In float32, the reward model is as it was loaded.
    heads = [model.score for model in ((judge, critic) if asked != "float32" else (critic,))]
    errors = [toy.rounding_errors(head) for head in heads]
    for network in (ppo.model, ppo.value_model, judge):
        for name, weight in network.named_parameters():
            assert weight.dtype == (torch.float32 if is_adapter(name) or asked == "float32" else torch.bfloat16), name
    ppo.train()
    assert all(found and max(found) < 1e-5 for found in errors), "scores and values are not rounded to 8 bits"
    assert ppo.state.log_history[0]["objective/kl"] == 0.0
