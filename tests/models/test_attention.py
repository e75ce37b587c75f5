"""Blockwise attention is transformers' own attention, whatever is masked, and computes less of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_model import tokenizer
from transformers import LlamaForCausalLM

from pipeline.models import attention
from pipeline.models.attention import BLOCKWISE, BlockMask, blockwise_mask, choose_attention
from pipeline.models.llama import LlamaArguments, build_model

LENGTH = 150  # two blocks and a part of one


def model() -> LlamaForCausalLM:
    sizes = LlamaArguments(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return build_model(sizes, tokenizer(), seed=0)


def inputs(case: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tokenizer()), (3, LENGTH), generator=generator)
    given = {"input_ids": ids, "labels": ids}
    if case == "packed":
        lengths = [[70, 1, 79], [20] * 7 + [10], [150]]
        given["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    elif case != "whole":
        mask = torch.ones_like(ids)
        for row, padding in enumerate((0, 5, 100)):
            mask[row, slice(LENGTH - padding, None) if case == "right" else slice(padding)] = 0
        given["attention_mask"] = mask
        given["labels"] = ids.where((mask * mask.roll(1, 1)).bool(), -100)  # padding predicts nothing
    return given


@pytest.mark.parametrize("case", ["packed", "whole", "left", "right"])
def test_losses_and_gradients_are_those_of_transformers_attention(case: str) -> None:
    one = model()
    other = copy.deepcopy(one)
    one.set_attn_implementation(BLOCKWISE)
    other.set_attn_implementation("eager")
    losses = []
    for trained in (one, other):
        loss = trained(**inputs(case), use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, x), y in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_document_does_not_see_the_one_before() -> None:
    trained = model()
    trained.set_attn_implementation(BLOCKWISE)
    given = inputs("packed")
    before = trained(input_ids=given["input_ids"], position_ids=given["position_ids"], use_cache=False).logits
    changed = given["input_ids"].clone()
    changed[0, :70] = changed[0, :70].flip(0)
    after = trained(input_ids=changed, position_ids=given["position_ids"], use_cache=False).logits
    assert torch.equal(before[0, 70:], after[0, 70:])
    assert not torch.equal(before[0, :70], after[0, :70])


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
        given = inputs("left")
        answers.append(trained.generate(given["input_ids"], attention_mask=given["attention_mask"], **greedy))
    assert torch.equal(*answers)


def test_it_is_used_on_a_cpu_unless_another_was_requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = model()
    monkeypatch.setattr(attention.hardware, "accelerator", lambda: "cuda")
    choose_attention(trained)
    assert trained.config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention.hardware, "accelerator", lambda: None)
    choose_attention(trained, requested="sdpa")
    assert trained.config._attn_implementation == "sdpa"
    choose_attention(trained)
    assert trained.config._attn_implementation == BLOCKWISE
    trained.save_pretrained(tmp_path)
    assert BLOCKWISE not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
