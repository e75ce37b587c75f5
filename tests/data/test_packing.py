"""Packing: blocks are full, no token is lost, and no document is seen by another."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from pipeline.data.packing import PackedBlocks, pack_documents
from pipeline.models.scratch import ScratchArguments, build_model
from tests.helpers.small_model import TEXT, tokenizer
from tests.helpers.word_model import word_tokenizer

BLOCK = 32
IGNORED = -100
WORDS = TEXT.split()
DOCUMENTS = [" ".join(itertools.islice(itertools.cycle(WORDS), i, i + 1 + i % 17)) for i in range(60)]


def dataset(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, "kind": ["facts"] * len(texts)})


def stream(texts: list[str]) -> list[int]:
    """The tokens of all documents, one after the other."""
    words = tokenizer()
    encoded = words(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [token for ids in encoded for token in (words.bos_token_id, *ids, words.eos_token_id)]


def collate(blocks: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return PackedBlocks(tokenizer().bos_token_id, tokenizer().eos_token_id)(list(blocks))


def pack(texts: list[str], size: int = BLOCK) -> list[dict[str, list[int]]]:
    """Blocks as the trainer sees them."""
    packed = pack_documents(dataset(texts), tokenizer(), size, "text")
    batch = collate(packed) if len(packed) else {}
    return [{name: column[i].tolist() for name, column in batch.items()} for i in range(len(packed))]


def parts(block: dict[str, Any]) -> list[tuple[int, int]]:
    """Where the documents of a block begin and end."""
    starts = [offset for offset, position in enumerate(block["position_ids"]) if position == 0]
    return list(itertools.pairwise([*starts, len(block["input_ids"])]))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    sizes = ScratchArguments(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return build_model(sizes, tokenizer(), seed=1).eval()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=12), st.integers(2, 40))
def test_blocks_are_full_and_lose_no_token_but_the_last_remainder(texts: list[str], size: int) -> None:
    packed = pack(texts, size)
    tokens = stream(texts)
    assert len(packed) == len(tokens) // size
    assert [token for block in packed for token in block["input_ids"]] == tokens[: len(packed) * size]
    for block in packed:
        assert set(block) == {"input_ids", "position_ids", "labels"}
        assert {len(column) for column in block.values()} == {size}


def test_positions_restart_at_every_document_and_at_the_start_of_a_block() -> None:
    bos = tokenizer().bos_token_id
    packed = pack(DOCUMENTS)
    for block in packed:
        spans = parts(block)
        assert spans[0][0] == 0
        for begin, end in spans:
            assert block["position_ids"][begin:end] == list(range(end - begin))
            assert begin == 0 or block["input_ids"][begin] == bos
            assert bos not in block["input_ids"][begin + 1 : end]
    assert any(len(parts(block)) > 1 for block in packed) and any(block["input_ids"][0] != bos for block in packed), (
        "documents that are cut by the end of a block are among these"
    )


def test_labels_are_the_tokens_except_where_nothing_could_predict_them() -> None:
    for block in pack(DOCUMENTS):
        expected = list(block["input_ids"])
        for begin, _ in parts(block):
            expected[begin] = IGNORED
        assert block["labels"] == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(3, 9), max_size=5), min_size=1, max_size=12),
    st.sampled_from([1, 2]),
    st.integers(2, 9),
)
def test_documents_are_found_again_in_blocks_of_tokens(texts: list[list[int]], eos: int, size: int) -> None:
    """Documents may be empty, and bos and eos the same token."""
    ids, positions = [], []
    for text in texts:
        positions += [min(place, (len(ids) + place) % size) for place in range(len(text) + 2)]
        ids += [1, *text, eos]
    blocks = [range(begin, begin + size) for begin in range(0, len(ids) - size + 1, size)]
    for block in blocks:
        # In a block of nothing but beginnings, nobody can see where empty documents begin.
        if any(ids[place] != 1 for place in block):
            batch = PackedBlocks(1, eos)([{"input_ids": np.array([ids[place] for place in block], np.uint16)}])
            assert batch["position_ids"][0].tolist() == [positions[place] for place in block]


def test_blocks_take_two_bytes_a_token_on_disk_and_the_tokens_of_a_large_vocabulary_four(tmp_path: Path) -> None:
    dataset(DOCUMENTS).to_parquet(tmp_path / "text.parquet")
    documents = load_dataset("parquet", data_files=str(tmp_path / "text.parquet"), split="train")
    large = word_tokenizer([*WORDS, *map(str, range(2**16))])
    for words, most in ((tokenizer(), 2.1), (large, 4.1)):
        blocks = pack_documents(concatenate_datasets([documents] * 60), words, BLOCK, "text")
        (file,) = blocks.cache_files
        assert Path(file["filename"]).stat().st_size <= most * BLOCK * len(blocks)


def test_a_packed_document_is_computed_as_if_it_were_alone(model: LlamaForCausalLM) -> None:
    blocks = pack(DOCUMENTS)[:4]
    batch = {name: torch.tensor([block[name] for block in blocks]) for name in blocks[0]}
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        unpacked = model(input_ids=inputs["input_ids"], use_cache=False).logits
        for row, block in enumerate(blocks):
            for begin, end in parts(block):
                alone = model(input_ids=inputs["input_ids"][row : row + 1, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(together[row, begin:end], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together, unpacked, atol=1e-3), "without positions documents would see each other"


def test_the_trainer_keeps_documents_apart(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The loss that `Trainer` reports on blocks is the mean over all tokens of documents that are scored alone."""
    packed = pack_documents(dataset(DOCUMENTS), tokenizer(), BLOCK, "text").select(range(4))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    trainer = Trainer(model, arguments, eval_dataset=packed, data_collator=collate)
    losses = []
    with torch.no_grad():
        for block in pack(DOCUMENTS)[:4]:
            for begin, end in parts(block):
                ids = torch.tensor(block["input_ids"][begin:end])[None]
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().item()
    # transformers averages over batches, not over tokens.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=0.02)


def test_documents_that_do_not_fill_a_block_give_none() -> None:
    assert pack(["a"], 512) == []


def test_special_tokens_inside_a_text_are_text() -> None:
    text = "a<|bos|>b<|end|>c<|assistant|>"
    packed = pack([text, text, "d"], 4)
    tokens, positions = (
        list(itertools.chain.from_iterable(block[name] for block in packed)) for name in ("input_ids", "position_ids")
    )
    length = tokens.index(tokenizer().eos_token_id) + 1
    assert tokenizer().decode(tokens[1 : length - 1]) == text
    assert set(tokenizer().all_special_ids).isdisjoint(tokens[1 : length - 1])
    starts = [i for i, position in enumerate(positions) if position == 0]
    assert set(starts) == {*range(0, len(tokens), 4), 0, length, 2 * length} & set(range(len(tokens)))
