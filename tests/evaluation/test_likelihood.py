"""Log-likelihoods in batches are those of single rows, and the logits of a batch are bounded."""

import weakref
from types import SimpleNamespace
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
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
)

from pipeline.evaluation import likelihood
from pipeline.evaluation.results import StageResult
from pipeline.evaluation.win_rate import measure_distance
from pipeline.tools.chat_model import ChatModel
from tests.helpers.word_model import word_model_config, word_tokenizer

TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
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
def test_batches_give_what_single_rows_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS[kind])
    sequences = [([(7 * i + n) % 300 for i in range(1, 4 + 9 * n)], 1 + n % 3) for n in range(1, 6)]
    whole = likelihood.sequence_losses(model, TOKENIZER, sequences)
    # Two rows, then one row whose logits alone are more than that.
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 300 * 40)
    parts = likelihood.sequence_losses(model, TOKENIZER, sequences)
    for number, (ids, first) in enumerate(sequences):
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(-logs[i - 1, ids[i]].item() for i in range(first, len(ids)))
        assert whole[number] == pytest.approx(expected, rel=1e-4)
        assert parts[number] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(16, 1024), (1, 1024), (2048, 8)])
def test_memory_of_a_default_batch_is_bounded(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # All at one 64th of a vocabulary of 151,936 tokens and of 2 GiB.
    model = build(Qwen2Config(**{**SIZES, "vocab_size": 151_936 // 64}))
    monkeypatch.setattr(likelihood, "MAX_LOGITS", likelihood.MAX_LOGITS // 64)
    ids = [n % 2000 for n in range(width)]
    with LiveBytes() as live:
        found = likelihood.sequence_losses(model, TOKENIZER, [(ids, 1)] * rows)
    assert len(found) == rows and len({round(loss, 3) for loss in found}) == 1
    assert live.peak < 2**31 / 64


def chat_of(seed: int, words: list[str]) -> ChatModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(word_model_config(words, initializer_range=0.5)).eval()
    return ChatModel(model, word_tokenizer(words), max_new_tokens=1)


def test_kl_and_entropy_are_those_of_all_answers() -> None:
    """With answers of one token, all of them can be counted."""
    words = ["red", "green", "blue"]
    rows = [{"id": number, "kind": "", "prompt": [{"role": "user", "content": "red"}]} for number in range(4000)]
    own, reference, result = chat_of(0, words), chat_of(1, words), StageResult("3_ppo")
    measure_distance(result, own, reference, rows)

    (ids,) = own.encode([rows[0]["prompt"]])
    with torch.no_grad():
        logs, others = (chat.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for chat in (own, reference))
    kl, entropy = (logs.exp() * (logs - others)).sum().item(), -(logs.exp() * logs).sum().item()
    assert result.metrics["kl"].value == pytest.approx(kl, abs=0.1) and kl > 0.5
    assert result.metrics["entropy"].value == pytest.approx(entropy, abs=0.05)

    measure_distance(result, own, own, rows[:8])
    assert result.metrics["kl"].value == 0
    before = dict(result.metrics)
    measure_distance(result, own, chat_of(1, ["red", "green", "pink"]), rows)
    assert result.metrics == before, "its tokens are others"
