"""Packs documents into blocks that are full to the last token, without one document seeing another."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_A_BATCH = 10_000
"""Documents packed together. The remainder of a batch that fills no block is dropped: a block in some ten megabytes."""


def pack_documents(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, text_column: str
) -> Dataset | IterableDataset:
    """Turns documents into blocks of `block_size` tokens, in the order of the data set.

    Each document is `bos + text + eos`. `position_ids` restart at every document, from which transformers (without an
    attention mask) builds a block-diagonal causal mask, so that a token sees its own document only; the first token of
    a document is no label, since nothing that it may see could predict it. A document cut by the end of a block goes
    on in the next one as if it began there.

    Args:
        dataset (`Dataset` or `IterableDataset`): documents; a streamed one stays streamed, in constant memory.
        tokenizer (`PreTrainedTokenizerBase`): with bos and eos.
        block_size (`int`): tokens of a block.
        text_column (`str`): column of the text; all columns are replaced.

    Returns:
        The same kind of data set with `input_ids`, `position_ids` and `labels`, lists of `block_size` integers.
    """

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch[text_column], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        documents = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]
        input_ids = list(chain.from_iterable(documents))
        starts = set()
        position = 0
        for document in documents:
            starts.add(position)
            position += len(document)
        blocks: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
        for begin in range(0, len(input_ids) - block_size + 1, block_size):
            block = input_ids[begin : begin + block_size]
            positions: list[int] = []
            for offset in range(block_size):
                positions.append(0 if begin + offset in starts or not positions else positions[-1] + 1)
            blocks["input_ids"].append(block)
            blocks["position_ids"].append(positions)
            blocks["labels"].append([-100 if p == 0 else token for p, token in zip(positions, block, strict=True)])
        return blocks

    columns = dataset.column_names
    if columns is None:  # a stream whose columns are known from its first row only
        columns = list(next(iter(dataset)))
    return dataset.map(pack, batched=True, batch_size=DOCUMENTS_A_BATCH, remove_columns=columns)
