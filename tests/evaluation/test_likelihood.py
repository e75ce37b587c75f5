"""Log-likelihoods are those of the whole logits, which are never in memory at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from pipeline.evaluation import likelihood

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "plain": Qwen2Config(vocab_size=300, **SIZES),
    "capped": Gemma2Config(vocab_size=300, head_dim=4, final_logit_softcapping=0.1, **SIZES),
    "divided": GraniteConfig(vocab_size=300, logits_scaling=7.0, **SIZES),
    "multiplied": CohereConfig(vocab_size=300, logit_scale=3.0, **SIZES),
    "experts": Llama4TextConfig(vocab_size=300, head_dim=4, intermediate_size_mlp=16, num_local_experts=2, **SIZES),
    "learned positions": GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=64),
}


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class LiveBytes(TorchDispatchMode):
    """Measures how many bytes of tensors that operations return are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("kind", CONFIGS)
def test_pieces_give_what_all_logits_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS[kind])
    rows = [([(7 * i + n) % 300 for i in range(1, 4 + 9 * n)], 1 + n % 3) for n in range(1, 6)]
    sequences = [(ids, range(first - 1, len(ids) - 1), ids[first:]) for ids, first in rows]
    whole = dict(likelihood.over_tokens(model, sequences, 0, batch_tokens=100))
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 300 * 7)
    pieces = dict(likelihood.over_tokens(model, sequences, 0, batch_tokens=100))
    for number, (ids, first) in enumerate(rows):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = torch.tensor([-logs[i - 1, ids[i]].item() for i in range(first, len(ids))])
        for found in (whole[number], pieces[number]):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_whose_logits_are_made_without_a_head_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["plain"])
    sequences = [([1, 2, 3, 4], range(3), [2, 3, 4])]
    expected = dict(likelihood.over_tokens(model, sequences, 0))
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(dict(likelihood.over_tokens(model, sequences, 0)), expected)


def test_a_model_that_calls_its_head_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["plain"])
    sequences = [([1, 2, 3, 4], range(3), [2, 3, 4])]
    expected = dict(likelihood.over_tokens(model, sequences, 0))

    class ByKeyword(torch.nn.Linear):
        def __call__(self, states: torch.Tensor) -> Any:
            return super().__call__(input=states)

    monkeypatch.setattr(model.lm_head, "__class__", ByKeyword)
    for limit in (likelihood.MAX_LOGITS, 300):
        monkeypatch.setattr(likelihood, "MAX_LOGITS", limit)
        torch.testing.assert_close(dict(likelihood.over_tokens(model, sequences, 0)), expected)


@pytest.mark.parametrize(
    ("kind", "rows", "width"), [("plain", 16, 1024), ("plain", 1, 4096), ("plain", 2048, 8), ("multiplied", 1, 4096)]
)
def test_memory_of_a_default_batch_is_bounded(
    kind: str, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All at one 64th of a vocabulary of 151,936 tokens and of 2 GiB.
    config = CONFIGS[kind].__class__(**{**CONFIGS[kind].to_dict(), "vocab_size": 151_936 // 64})
    monkeypatch.setattr(likelihood, "MAX_LOGITS", likelihood.MAX_LOGITS // 64)
    model, ids = build(config), [n % 2000 for n in range(width)]
    with LiveBytes() as live:
        found = list(likelihood.over_tokens(model, [(ids, range(width - 1), ids[1:])] * rows, 0))
    assert len(found) == rows
    assert live.peak < 2**31 / 64


def test_memory_of_a_row_is_bounded_for_a_real_vocabulary() -> None:
    model = build(Qwen2Config(**{**SIZES, "vocab_size": 151_936}))
    ids = list(range(700))
    with LiveBytes() as live:
        ((_, found),) = likelihood.over_tokens(model, [(ids, range(699), ids[1:])], 0)
    assert len(found) == 699
    # All logits of the row take 425 MB. A piece takes a quarter of a gigabyte, and so does its softmax.
    assert 2**27 < live.peak < 1.1 * 2**29
