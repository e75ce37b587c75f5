"""Texts computed in groups of similar length have the same values and gradients as in one batch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from pipeline.rl import log_probs as module
from pipeline.rl.log_probs import token_log_probs
from pipeline.rl.value_model import token_values, value_model_from
from tests import ppo_toy as toy

POLICY = toy.policy()
CRITIC = value_model_from(toy.reward_model())
torch.manual_seed(0)
ABSOLUTE = GPT2LMHeadModel(GPT2Config(vocab_size=15, n_positions=64, n_embd=16, n_layer=2, n_head=2)).eval()
"""A model with a learned embedding for each position."""

Lengths = list[tuple[int, int]]
lengths = st.lists(st.tuples(st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=9)
"""Numbers of tokens of prompt and completion; an empty completion is a truncated one that was masked."""


def padded(texts: Lengths) -> tuple[Tensor, Tensor, int]:
    """Return token ids, attention mask, and the number of columns of the completions."""
    before, after = (max(column) for column in zip(*texts, strict=True))
    after = max(after, 1)
    mask = torch.tensor([[0] * (before - p) + [1] * (p + c) + [0] * (after - c) for p, c in texts])
    generator = torch.Generator().manual_seed(sum(p * 31 + c for p, c in texts))
    return torch.randint(3, 15, mask.shape, generator=generator) * mask, mask, after


def log_probs(
    ids: Tensor, mask: Tensor, length: int, batch_size: int | None, policy: PreTrainedModel = POLICY
) -> Tensor:
    scored, entropies = token_log_probs(
        policy,
        ids,
        mask,
        length,
        batch_size=batch_size,
        temperature=0.8,
        entropy=True,
        entropy_gradient=True,
        autocast=nullcontext,
    )
    return scored + 0.1 * entropies


def values(ids: Tensor, mask: Tensor, length: int, batch_size: int | None) -> Tensor:
    return token_values(CRITIC, ids, mask, length, batch_size, nullcontext)


def result_and_gradient(model: nn.Module, computed: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the result is 0 at padding, and return it with its gradient."""
    assert not computed[~real].any()
    gradients = torch.autograd.grad(computed.square().sum(), list(model.parameters()), allow_unused=True)
    return computed.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("model", ["policy", "critic"])
@settings(max_examples=60, deadline=None)
@given(texts=lengths, rows=st.integers(1, 4), batch_size=st.none() | st.integers(1, 9))
def test_groups_change_nothing(model: str, texts: Lengths, rows: int, batch_size: int | None) -> None:
    network, compute = (POLICY, log_probs) if model == "policy" else (CRITIC, values)
    ids, mask, length = padded(texts)
    real = mask[:, -length:] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_ROWS", len(texts))
        whole = result_and_gradient(network, compute(ids, mask, length, None), real)
        patch.setattr(module, "CPU_ROWS", rows)
        computed = compute(ids, mask, length, batch_size)
    assert computed.shape == real.shape
    grouped = result_and_gradient(network, computed, real)
    for a, b in zip(whole, grouped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(texts=lengths)
def test_padding_does_not_change_positions(texts: Lengths) -> None:
    """Even with absolute positions, each text has the values that it has alone, as when it is sampled."""
    ids, mask, length = padded(texts)
    computed = log_probs(ids, mask, length, None, ABSOLUTE)
    for row, (prompt, completion) in enumerate(texts):
        if completion:
            text = ids[row, mask[row] > 0].unsqueeze(0)
            assert text.shape[1] == prompt + completion
            alone = log_probs(text, torch.ones_like(text), completion, None, ABSOLUTE)
            torch.testing.assert_close(computed[row, :completion], alone[0], rtol=1e-4, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(texts=lengths, rows=st.integers(1, 4), batch_size=st.none() | st.integers(1, 9))
def test_every_token_is_in_one_group(texts: Lengths, rows: int, batch_size: int | None) -> None:
    _, mask, length = padded(texts)
    seen = torch.zeros_like(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_ROWS", rows)
        groups = module.length_groups(mask, length, batch_size)
    for group in groups:
        assert len(group.rows) <= min(rows, batch_size or rows)
        assert group.columns.stop == mask.shape[1] - length + group.length
        seen[group.rows, group.columns] += 1
    assert seen.max() == 1 and (seen >= mask).all()


def test_a_long_completion_does_not_pad_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_ROWS", 4)
    shapes = []

    def spy(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))

    handle = POLICY.register_forward_pre_hook(spy, with_kwargs=True)
    log_probs(*padded([(3, 40), *[(3, 2)] * 7]), batch_size=None)
    handle.remove()
    assert shapes == [(4, 5), (4, 43)]
