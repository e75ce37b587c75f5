"""Texts that share forward passes and prompts have the values and gradients that each has alone."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from pipeline.models.kernels import log_probs
from pipeline.models.kernels import token_trees as layout
from pipeline.models.kernels.log_probs import token_log_probs
from pipeline.models.kernels.token_trees import shares_beginnings
from pipeline.rl.critic import token_values
from pipeline.rl.value_model import value_model_from
from tests.helpers import ppo_toy as toy

SIZES: dict[str, Any] = {"vocab_size": 15, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
torch.manual_seed(0)
MODELS = {
    "llama": toy.policy(),
    "critic": value_model_from(toy.reward_model()),
    "absolute positions": GPT2LMHeadModel(GPT2Config(vocab_size=15, n_positions=64, n_embd=16, n_layer=2, n_head=2)),
    "sliding window": MistralForCausalLM(MistralConfig(sliding_window=4, **SIZES, **HEADS)),
}
for network in MODELS.values():
    network.eval()

Texts = list[tuple[int, int, int]]
texts = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=9)
"""Which prompt, of how many tokens, and the tokens of the completion; an empty one is a truncated one, masked."""


def padded(texts: Texts) -> tuple[Tensor, Tensor, int]:
    """Return token ids, attention mask, and the number of columns of the completions."""
    prompt_length = max(p for _, p, _ in texts)
    length = max(1, *(c for _, _, c in texts))
    mask = torch.tensor([[0] * (prompt_length - p) + [1] * (p + c) + [0] * (length - c) for _, p, c in texts])
    generator = torch.Generator().manual_seed(sum(p * 31 + c for _, p, c in texts))
    prompts = torch.randint(3, 15, (3, prompt_length), generator=generator)
    completions = torch.randint(3, 15, (len(texts), length), generator=generator)
    return torch.cat([prompts[[number for number, _, _ in texts]], completions], dim=1) * mask, mask, length


def computed(model: nn.Module, ids: Tensor, mask: Tensor, length: int, batch_size: int | None) -> Tensor:
    if model is MODELS["critic"]:
        return token_values(model, ids, mask, length, batch_size, nullcontext)
    options: dict[str, Any] = {"temperature": 0.8, "entropy": True, "entropy_gradient": True, "autocast": nullcontext}
    scored, entropies = token_log_probs(model, ids, mask, length, batch_size=batch_size, **options)
    return scored + 0.1 * entropies


def alone(model: nn.Module, text: Tensor, completion: int) -> Tensor:
    """Compute the same from the logits of one text without padding."""
    logits = model(input_ids=text[None]).logits[0, -completion - 1 : -1]
    if model is MODELS["critic"]:
        return logits[:, 0]
    logs = (logits / 0.8).log_softmax(-1)
    return logs.gather(-1, text[-completion:, None])[:, 0] - 0.1 * (logs.exp() * logs).sum(-1)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40, deadline=None)
@given(
    texts=texts,
    tokens=st.integers(1, 200),
    batch_size=st.none() | st.integers(1, 9),
    limit=st.sampled_from((0, log_probs.MAX_LOGITS)),
)
def test_company_changes_nothing(name: str, texts: Texts, tokens: int, batch_size: int | None, limit: int) -> None:
    model = MODELS[name]
    ids, mask, length = padded(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CPU_TOKENS", tokens)
        patch.setattr(log_probs, "MAX_LOGITS", limit)
        together = computed(model, ids, mask, length, batch_size)
    assert together.shape == (len(texts), length)
    expected = torch.zeros_like(together)
    for row, (_, _, completion) in enumerate(texts):
        if completion:
            expected[row, :completion] = alone(model, ids[row, mask[row] > 0], completion)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    if expected.requires_grad:
        grads = [gradient(model, result.square().sum()) for result in (together, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_batch_without_any_token_has_gradients_of_zero() -> None:
    """Every process of a group needs them."""
    model = MODELS["llama"]
    assert not gradient(model, computed(model, *padded([(0, 3, 0), (1, 2, 0)]), None).sum()).any()


def shapes_of_passes(texts: Texts, tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    monkeypatch.setattr(layout, "CPU_TOKENS", tokens)
    shapes = []

    def spy(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))

    handle = MODELS["llama"].register_forward_pre_hook(spy, with_kwargs=True)
    computed(MODELS["llama"], *padded(texts), batch_size=None)
    handle.remove()
    return shapes


def test_a_long_completion_does_not_pad_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise, texts of so few tokens share the first one by chance.
    monkeypatch.setattr(layout, "ATTENTION_COSTS", 0)
    texts = [(0, 3 + number, 2) for number in range(4)]
    assert shapes_of_passes([(1, 3, 40), *texts], 40, monkeypatch) == [(4, 8), (1, 43)]


def test_a_prompt_is_computed_once_unless_its_completions_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of the completions begin with the same token, and two others, too.
    assert shapes_of_passes([(0, 30, 2)] * 8, 1000, monkeypatch) == [(1, 44)]
    monkeypatch.setattr(layout, "ATTENTION_COSTS", 0)
    assert shapes_of_passes([(0, 10, 10)] * 4, 1000, monkeypatch) == [(4, 20)]


def test_prompts_are_shared_where_the_mask_decides_what_is_seen() -> None:
    assert {name: shares_beginnings(model) for name, model in MODELS.items()} == {
        "llama": True,
        "critic": True,
        "absolute positions": True,
        "sliding window": False,
    }
