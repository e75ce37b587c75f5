"""Attention for packed documents is transformers' own attention, whatever is masked, and computes less of it."""

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from pipeline.data.packing import PackedBlocks
from pipeline.errors import UserError
from pipeline.hardware import Choice
from pipeline.models.kernels import attention
from pipeline.models.kernels.attention import (
    BLOCKWISE,
    VARLEN,
    BlockMask,
    blockwise_mask,
    choose_attention,
)
from pipeline.models.scratch import ScratchArguments, build_model
from tests.helpers.small_model import tokenizer

VARLEN_ATTN = "torch.nn.attention.varlen.varlen_attn"
# Attention gets two whole blocks and a part of one.
LENGTH = 150


def model() -> LlamaForCausalLM:
    sizes = ScratchArguments(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return build_model(sizes, tokenizer(), seed=0)


def inputs(case: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer()), (3, LENGTH), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if case == "packed":
        lengths = [[70, 1, 79], [20] * 7 + [10], [150]]
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    elif case != "whole":
        mask = torch.ones_like(ids)
        for row, padding in enumerate((0, 5, 100)):
            mask[row, slice(LENGTH - padding, None) if case == "right" else slice(padding)] = 0
        batch["attention_mask"] = mask
        # Nothing is predicted from padding.
        batch["labels"] = ids.where((mask * mask.roll(1, 1)).bool(), -100)
    return batch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[list[int], int]]]:
    """Replace the kernels of GPUs by their definitions, and yield the bounds that FlashAttention gets."""
    calls: list[tuple[list[int], int]] = []

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == torch.int32 and window_size == (-1, 0)
        calls.append((cu_seq_q.tolist(), max_q))
        sizes = cu_seq_q.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(sizes, 1) for x in (query, key, value)), strict=True)
        options = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        return torch.cat([scaled_dot_product_attention(*part, **options) for part in parts], 1).transpose(0, 1)

    monkeypatch.setattr(VARLEN_ATTN, varlen_attn)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    # Compiling FlexAttention takes a minute.
    with torch._dynamo.config.patch(disable=True):
        yield calls


@pytest.mark.parametrize("case", ["packed", "whole", "left", "right"])
@pytest.mark.parametrize("kind", [BLOCKWISE, VARLEN])
def test_losses_and_gradients_are_those_of_transformers_attention(
    kind: str, case: str, calls: list[tuple[list[int], int]]
) -> None:
    eager = model()
    tested = copy.deepcopy(eager).to(torch.float32 if kind == BLOCKWISE else torch.float64)
    tested.set_attn_implementation(kind)
    eager.set_attn_implementation("eager")
    losses = []
    for trained in (tested, eager):
        loss = trained(**inputs(case), use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, x), y in zip(tested.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(x.grad.float(), y.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert bool(calls) == (kind == VARLEN and case in ("packed", "whole")), "padding is left to torch's kernels"


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex_attention", BLOCKWISE, VARLEN])
@torch.no_grad()
def test_a_document_does_not_see_the_one_before(kind: str, calls: list[tuple[list[int], int]]) -> None:
    trained = model().to(torch.float64 if kind == VARLEN else torch.float32)
    trained.set_attn_implementation(kind)
    batch = inputs("packed")
    logits = trained(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    changed = batch["input_ids"].clone()
    changed[0, :70] = changed[0, :70].flip(0)
    changed_logits = trained(input_ids=changed, position_ids=batch["position_ids"], use_cache=False).logits
    assert torch.equal(logits[0, 70:], changed_logits[0, 70:])
    assert torch.equal(logits[1:], changed_logits[1:])
    assert not torch.equal(logits[0, :70], changed_logits[0, :70])
    assert bool(calls) == (kind == VARLEN)


def test_flash_attention_gets_the_bounds_of_the_documents(calls: list[tuple[list[int], int]]) -> None:
    """As transformers' collator for FlashAttention finds them, which puts a batch into one row."""
    bos, eos = tokenizer().bos_token_id, tokenizer().eos_token_id
    rows = [
        # The row has the end of a document, a whole one, and the beginning of one.
        [[7, 8, eos], [bos, 7, 8, 9, eos], [bos]],
        # The row lies inside a document.
        [[7, 8, 9] * 3],
        [[bos, eos], [bos, eos], [bos, 7, 8, 9, eos]],
    ]
    blocks = [{"input_ids": np.array([*chain(*row)])} for row in rows]
    documents = [{"input_ids": document} for row in rows for document in row]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    batch = PackedBlocks(bos, eos)(blocks)
    trained = model().double()
    trained.set_attn_implementation(VARLEN)
    trained(**batch, use_cache=False)
    assert calls == [(expected["cu_seq_lens_q"].tolist(), expected["max_length_q"])] * 2, "in both layers"


def test_without_16_bits_there_is_no_flash_attention(calls: list[tuple[list[int], int]]) -> None:
    trained = model()
    trained.set_attn_implementation(VARLEN)
    trained(**inputs("packed"), use_cache=False)
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        trained(**inputs("packed"), use_cache=False)
    assert calls


def test_blocks_that_are_masked_are_not_computed() -> None:
    documents = torch.arange(512) // 64
    mask = blockwise_mask(
        batch_size=2,
        q_length=512,
        kv_length=512,
        mask_function=lambda batch, head, query, key: (query >= key) & (documents[query] == documents[key]),
    )
    assert isinstance(mask, BlockMask)
    assert sum(bias.shape[-1] for bias in mask.biases) == 512, "one block of keys for each of queries"


def test_answers_are_the_same_with_a_cache() -> None:
    greedy = {"max_new_tokens": 70, "do_sample": False, "min_new_tokens": 70}
    answers = []
    for name in (BLOCKWISE, "eager"):
        trained = model()
        trained.set_attn_implementation(name)
        batch = inputs("left")
        answers.append(trained.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **greedy))
    assert torch.equal(*answers)


def test_it_is_used_on_a_cpu_unless_another_was_requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = model()
    monkeypatch.setattr(attention.hardware, "accelerator", lambda: None)
    choose_attention(trained, requested="sdpa")
    assert trained.config._attn_implementation == "sdpa"
    choose_attention(trained)
    assert trained.config._attn_implementation == BLOCKWISE
    trained.save_pretrained(tmp_path)
    assert BLOCKWISE not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_flash_attention_is_used_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[list[int], int]]
) -> None:
    # What the kernels of a GPU compute is computed on the CPU.
    monkeypatch.setattr(attention.hardware, "accelerator", lambda: "cpu")
    monkeypatch.setattr(attention.hardware, "attention", lambda: Choice(VARLEN, ""))

    def chosen(requested: str | None = None, **changes: object) -> str | None:
        trained = model()
        trained.config.update(changes)
        choose_attention(trained, requested)
        chosen: str | None = trained.config._attn_implementation
        return chosen

    assert chosen() == VARLEN and calls
    assert chosen(attention_dropout=0.1) == chosen(sliding_window=64) == "sdpa"
    assert chosen(v_head_dim=16) == "sdpa", "queries and values differ in size"
    assert chosen(requested="flex_attention") == "flex_attention"

    def fails(*states: torch.Tensor, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(VARLEN_ATTN, fails)
    assert chosen() == "sdpa"
    monkeypatch.setattr(VARLEN_ATTN, None)
    assert chosen() == "sdpa"
    monkeypatch.setattr(attention.hardware, "accelerator", lambda: None)
    with pytest.raises(UserError, match="no gradients on a CPU"):
        chosen(requested="flex_attention")


def test_flash_attention_that_fails_is_found_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[list[int], int]]
) -> None:
    assert attention.validate_varlen(model(), "cpu") is None
    small = GPT2Config(n_embd=32, n_layer=1, n_head=2, attn_pdrop=0.0)
    assert attention.validate_varlen(GPT2LMHeadModel(small), "cpu") is None
    assert calls == [([0, 5, 12], 7)] * 2

    def fails(*states: torch.Tensor, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(VARLEN_ATTN, fails)
    assert attention.validate_varlen(model(), "cpu") == "FlashAttention fails here: no kernel image is available"
