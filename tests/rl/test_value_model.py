"""What the critic of PPO is made from, and what it estimates at first."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Glm4MoeConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.rl.arguments import PPORewardArguments
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.reward_checks import check_reward_model, check_value_model
from pipeline.rl.value_model import value_model_from
from tests.helpers import ppo_toy as toy

IDS = torch.tensor([[3, 5, 6, 4, 7, 2]])


def trainer(tmp_path: Path, rewards: list[Any], options: dict[str, Any] | None = None, **given: Any) -> PPOTrainer:
    """Build a trainer; rewards that are models use the toy tokenizer. `options` are fields of its configuration."""
    given.setdefault("model", toy.policy())
    return PPOTrainer(
        reward_funcs=rewards,
        args=toy.config(tmp_path / "run", **(options or {})),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
        reward_processing_classes=[None if callable(r) and not _is_model(r) else toy.tokenizer() for r in rewards],
        **given,
    )


def _is_model(reward: Any) -> bool:
    return isinstance(reward, torch.nn.Module)


def estimate_at_the_end(critic: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(critic(input_ids=IDS).logits[0, -1])


def reward_of(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=IDS).logits[0, 0])


def save_adapter(folder: Path) -> float:
    """Save a reward model that is an adapter of a language model, as `RewardTrainer` does, and return its reward."""
    toy.policy().save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = get_peft_model(model, lora)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad or "lora_B" in name:
            parameter.data.normal_()
    adapted.save_pretrained(folder / "adapter")
    return reward_of(adapted)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_the_default_is_a_copy_of_the_reward_model_in_the_units_of_the_score(
    tmp_path: Path, weight: float, lora: bool
) -> None:
    """Whatever else is measured, with weight 0, before it or after it."""
    judge = toy.reward_model()
    adapter = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")} if lora else {}
    rewards, weights = [toy.share_of_red, toy.reward_model(5), judge], [0.0, 0.0, weight]
    ppo = trainer(tmp_path, rewards, {"reward_weights": weights}, **adapter)
    assert estimate_at_the_end(ppo.value_model) == pytest.approx(weight * reward_of(judge), abs=1e-6)
    assert reward_of(judge) == reward_of(toy.reward_model()) != 0.0


@pytest.mark.parametrize(
    "options",
    [{"reward_normalization": "running"}, {"reward_normalization": "batch"}, {"reward_weights": [0.5, 0.5]}],
    ids=str,
)
def test_a_copy_estimates_zero_if_the_score_is_something_else(tmp_path: Path, options: dict[str, Any]) -> None:
    judge = toy.reward_model()
    rewards = [judge, toy.share_of_red] if "reward_weights" in options else [judge]
    for given in ({}, {"value_model": toy.reward_model(5)}):
        ppo = trainer(tmp_path, rewards, options, **given)
        assert estimate_at_the_end(ppo.value_model) == 0.0
        source = given.get("value_model", judge)
        assert torch.equal(ppo.value_model.model.embed_tokens.weight, source.model.embed_tokens.weight)


def test_a_reward_model_that_lacks_embeddings_of_the_policy_is_not_copied(tmp_path: Path) -> None:
    """Models pad their embeddings differently, and an untrained policy samples what no token has."""
    config = toy.llama_config()
    config.vocab_size += 8
    judge = toy.reward_model()
    # The configuration may name more tokens than there are embeddings.
    for rows in (judge.config.vocab_size, config.vocab_size):
        judge.config.vocab_size = rows
        ppo = trainer(tmp_path, [judge], model=LlamaForCausalLM(config))
        assert torch.equal(ppo.value_model.model.embed_tokens.weight, ppo.model.model.embed_tokens.weight)


def test_a_policy_with_code_of_its_own_needs_a_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the caller's, but transformers would ask on the terminal whether to run the code."""
    config_class = type("RemoteConfig", (LlamaConfig,), {"model_type": "remote"})
    policy_class = type("RemoteForCausalLM", (LlamaForCausalLM,), {"config_class": config_class})
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, config_class, policy_class)
    config = config_class(**toy.llama_config().to_diff_dict())
    config.auto_map = {"AutoModel": "alice/remote--modeling_remote.RemoteModel"}
    policy = policy_class(config)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on the terminal"))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for given in ({}, {"peft_config": lora}):
        with pytest.raises(ValueError, match="from a RemoteConfig: pass your own `value_model`"):
            trainer(tmp_path, [toy.share_of_red], model=policy, **given)
    critic = AutoModelForTokenClassification.from_config(toy.llama_config(num_labels=1))
    trainer(tmp_path, [toy.share_of_red], model=policy_class(config), value_model=critic).train()


def test_a_copy_of_the_policy_estimates_zero(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, [toy.share_of_red])
    assert torch.equal(ppo.value_model.model.norm.weight, ppo.model.model.norm.weight)
    assert torch.equal(ppo.value_model.model.embed_tokens.weight, ppo.model.model.embed_tokens.weight)
    assert not ppo.value_model.score.weight.any()


def test_a_given_critic_is_itself_trained(tmp_path: Path) -> None:
    critic = AutoModelForTokenClassification.from_config(toy.llama_config(num_labels=1))
    assert trainer(tmp_path, [toy.reward_model()], value_model=critic).value_model is critic
    critic.save_pretrained(tmp_path / "critic")
    loaded = trainer(tmp_path, [toy.reward_model()], value_model=str(tmp_path / "critic")).value_model
    assert estimate_at_the_end(loaded) == pytest.approx(estimate_at_the_end(critic), abs=1e-6)


@pytest.mark.parametrize("given", ["model", "path"])
@pytest.mark.parametrize("source", ["reward model", "policy"])
def test_any_other_given_model_is_copied(tmp_path: Path, source: str, given: str) -> None:
    """A reward model in the units of the score, if it is the reward."""
    model = toy.reward_model(5) if source == "reward model" else toy.policy(5)
    model.save_pretrained(tmp_path / "model")
    value_model = model if given == "model" else str(tmp_path / "model")
    for reward in (toy.reward_model(), toy.reward_model(5), toy.share_of_red):
        is_source = (
            source == "reward model" and _is_model(reward) and torch.equal(reward.score.weight, model.score.weight)
        )
        critic = trainer(tmp_path, [reward], {"reward_weights": [3.0]}, value_model=value_model).value_model
        assert critic is not model
        assert torch.equal(critic.model.norm.weight, model.model.norm.weight)
        expected = 3 * reward_of(model) if is_source else 0.0
        assert estimate_at_the_end(critic) == pytest.approx(expected, abs=1e-6)


def test_a_mixture_of_experts_for_which_transformers_has_no_classifier_becomes_a_critic() -> None:
    """The implementation of the experts, which its configuration names, is that of its language model."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = Glm4MoeConfig(vocab_size=15, n_routed_experts=4, num_experts_per_tok=2, pad_token_id=0, **sizes, **heads)
    assert estimate_at_the_end(value_model_from(AutoModelForCausalLM.from_config(config)).eval()) == 0.0


def test_the_heads_of_other_architectures_are_found(tmp_path: Path) -> None:
    """GPT-2's reward model calls its head "score"; its token classifier, "classifier"."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=15, n_positions=32, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)
    policy = GPT2LMHeadModel(config)
    config.num_labels = 1
    reward_model = GPT2ForSequenceClassification(config)
    reward_model.save_pretrained(tmp_path / "reward")
    ppo = trainer(tmp_path, [reward_model], model=policy, value_model=str(tmp_path / "reward"))
    assert estimate_at_the_end(ppo.value_model) == pytest.approx(reward_of(reward_model), abs=1e-6)


@pytest.mark.parametrize("given", ["reward", "value model"])
def test_an_adapter_is_merged_into_the_copy(tmp_path: Path, given: str) -> None:
    expected = save_adapter(tmp_path)
    adapter = str(tmp_path / "adapter")
    if given == "reward":
        ppo = trainer(tmp_path, [adapter])
        assert reward_of(ppo.reward_funcs[0].model) == pytest.approx(expected, abs=1e-5)
    else:
        judge = AutoModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
        ppo = trainer(tmp_path, [judge], value_model=adapter)
    assert estimate_at_the_end(ppo.value_model) == pytest.approx(expected, abs=1e-5)
    assert not any("lora" in name for name, _ in ppo.value_model.named_parameters())
    ppo.train()


def test_an_adapter_of_the_policy_is_merged_into_the_copy(tmp_path: Path) -> None:
    policy = get_peft_model(toy.policy(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data.normal_()
    ppo = trainer(tmp_path, [toy.share_of_red], model=policy, value_use_peft=False)
    copied = ppo.value_model.model.layers[0].self_attn.q_proj.weight
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(copied, expected)
    assert not torch.equal(copied, layer.base_layer.weight)


@pytest.mark.parametrize("given", ["reward", "value model"])
def test_a_copy_has_the_dtype_of_the_policy(tmp_path: Path, given: str) -> None:
    """In bfloat16, updates would be rounded away."""
    toy.reward_model().to(torch.bfloat16).save_pretrained(tmp_path / "reward")
    reward = str(tmp_path / "reward")
    ppo = (
        trainer(tmp_path, [reward]) if given == "reward" else trainer(tmp_path, [toy.share_of_red], value_model=reward)
    )
    assert ppo.model.dtype == ppo.value_model.dtype == torch.float32


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForSequenceClassification])
def test_several_labels_are_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match="3 labels"):
        trainer(tmp_path, [toy.share_of_red], value_model=kind.from_config(toy.llama_config(num_labels=3)))


def test_the_recipe_accepts_adapters_and_refuses_broken_ones(tmp_path: Path) -> None:
    save_adapter(tmp_path)
    adapter = str(tmp_path / "adapter")
    assert check_reward_model(adapter) == check_value_model(adapter, toy.tokenizer()) == []
    assert PPORewardArguments([adapter], value_model_path=adapter).preflight(None, toy.tokenizer(), None) == []

    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (problem,) = check_reward_model(adapter)
    assert "adapter_model.safetensors" in problem.remedy
    save_adapter(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    (problem,) = check_reward_model(adapter)
    assert f"its base model {tmp_path / 'base'}: does not contain weights" in problem.remedy
    (tmp_path / "base" / "config.json").unlink()
    (problem,) = check_reward_model(adapter)
    assert problem.field == "reward_model_path" and str(tmp_path / "base") in str(problem)


def test_an_8_bit_optimizer_keeps_the_moments_of_the_critics_embeddings_in_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[Any] = []
    manager = SimpleNamespace(register_module_override=lambda *given: registered.append(given))
    optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))

    class AdamW(torch.optim.AdamW):
        __module__ = "bitsandbytes.optim.adamw"

        def __init__(self, params: Any, optim_bits: int) -> None:
            super().__init__(params)

    settings = staticmethod(lambda args, model=None: (AdamW, {"optim_bits": 8}))
    monkeypatch.setattr(PPOTrainer, "get_optimizer_cls_and_kwargs", settings)
    ppo = trainer(tmp_path, [toy.share_of_red])
    ppo.create_optimizer_and_scheduler(1)
    assert isinstance(ppo.critic.optimizer, AdamW)
    assert (ppo.value_model.model.embed_tokens, "weight", {"optim_bits": 32}) in registered


def test_a_given_copy_of_the_reward_model_is_known_in_another_dtype(tmp_path: Path) -> None:
    critic = trainer(tmp_path, [toy.reward_model().bfloat16()], value_model=toy.reward_model()).value_model
    assert estimate_at_the_end(critic) == pytest.approx(reward_of(toy.reward_model()), abs=1e-6) != 0.0
