"""Packing: documents into full blocks for pretraining, and packed conversations into batches for SFT.

No document or conversation sees another: `position_ids` restart at each of them, and from these (without an attention
mask) transformers builds a block-diagonal causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.data.columns import TOKENS
from pipeline.errors import Problem, UserError

DOCUMENTS_AT_ONCE = 1000
"""Documents tokenized at once; `tokenizers` takes some hundred bytes for each of their tokens."""
IGNORED = -100
"""Label of a token without loss (the convention of torch's cross entropy)."""


def pack_documents(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str, num_proc: int | None = None
) -> Dataset:
    """Pack documents, in order, into blocks: the column `input_ids`, arrays of `block_size` integers.

    Each document, a text of `column` or its tokens, is `bos + text + eos`. A document cut off by the end of a block
    continues in the next block as if it began there. On disk a token takes 2 bytes, or 4 if the vocabulary is larger
    than 65,536.

    Args:
        tokenizer: A tokenizer with bos and eos tokens.
        block_size: Number of tokens in a block.
        column: Column of the texts, or of their tokens. All columns are replaced.
        num_proc: Number of processes that tokenize, each a part of the documents. Default: this one, on all cores.

    Returns:
        The blocks; `PackedBlocks` makes batches of them.
    """
    encode = Encoder.of(tokenizer)

    def pack(batch: pa.Table) -> pa.Table:
        ids = encode(batch[column].to_pylist())
        # Drop the rest that does not fill a block: per 10,000 documents, at most one block in about 10 MB.
        ids = ids[: len(ids) // block_size * block_size]
        return pa.table({TOKENS: pa.FixedSizeListArray.from_arrays(pa.array(ids), block_size)})

    options = {"batch_size": 10_000, "remove_columns": dataset.column_names, "num_proc": num_proc}
    # Arrow tables pass the ids on without Python lists.
    return dataset.with_format("arrow").map(pack, batched=True, **options).with_format("numpy")


@dataclass
class Encoder:
    """Tokens of documents: `bos + text + eos`, one document after the other.

    Attributes:
        backend: The tokenizer of the library `tokenizers`, without truncation or padding.
        bos: Token before a text.
        eos: Token after a text.
        largest_id: The largest id of a token.
        dtype: Unsigned integers that hold all tokens, in 16 bits if possible: "uint16" or "uint32".
    """

    backend: Tokenizer
    bos: int
    eos: int
    largest_id: int
    dtype: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Return the encoder of a tokenizer, which has the same hash in all processes that prepare the same data."""
        if not tokenizer.is_fast:
            remedy = "does not use the library tokenizers; choose another one"
            raise UserError(Problem("tokenizer_name_or_path", tokenizer.name_or_path, remedy))
        # An earlier call may have set truncation or padding, which would be part of the hash.
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        # Ids may have gaps, so the size of the vocabulary is not enough.
        largest_id = max(tokenizer.get_vocab().values())
        dtype = "uint16" if largest_id < 2**16 else "uint32"
        return cls(backend, tokenizer.bos_token_id, tokenizer.eos_token_id, largest_id, dtype)

    def __call__(self, documents: Sequence[Any]) -> np.ndarray:
        """Return the tokens, shape (tokens,), of documents, which are texts or already tokens.

        Raise a `UserError` if tokens are not `bos + text + eos`, or not from this tokenizer.
        """
        if isinstance(documents[0], str):
            # A text such as "<eos>" in a document is encoded as ordinary text, and does not end the document.
            self.backend.encode_special_tokens = True
            arrays = []
            for begin in range(0, len(documents), DOCUMENTS_AT_ONCE):
                batch = documents[begin : begin + DOCUMENTS_AT_ONCE]
                encoded = self.backend.encode_batch_fast(batch, add_special_tokens=False)
                tokens = chain.from_iterable((self.bos, *text.ids, self.eos) for text in encoded)
                # Convert directly to an array: lists of Python integers take 30 bytes a token.
                arrays.append(np.fromiter(tokens, self.dtype))
            return np.concatenate(arrays)
        if not all(len(ids) and ids[0] == self.bos and ids[-1] == self.eos for ids in documents):
            remedy = f"documents must begin with the tokenizer's bos ({self.bos}) and end with its eos ({self.eos})"
            raise UserError(Problem("dataset_name", "the shards", f"{remedy}; make them with recipes.shards"))
        ids = np.concatenate(documents)
        largest_id = ids.max()
        if largest_id > self.largest_id:
            remedy = f"contain the token {largest_id}, but the tokenizer's last is {self.largest_id}; "
            remedy += "give a matching one"
            raise UserError(Problem("dataset_name", "the shards", remedy))
        return ids.astype(self.dtype)


@dataclass
class PackedBlocks:
    """Collator that finds the documents in packed blocks, and keeps them apart.

    A document begins with a bos token that follows an eos token. If both are the same token, they alternate in each run
    of it: the first one after a text is an eos, and the last one before a text is a bos.

    Attributes:
        bos: Token before each document.
        eos: Token after each document.
    """

    bos: int
    eos: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `position_ids` (which restart at each document) and `labels`, each (batch, block size).

        The first token of a document is not a label, because no token before it is visible.
        """
        ids = np.stack([example["input_ids"] for example in examples]).astype(np.int64)
        places = np.arange(ids.shape[1])
        begins = ids == self.bos
        if self.bos == self.eos:
            # The position of each token in its run, from 0. In a run after a text, the odd ones are bos:
            #
            #   tokens          text  eos  bos  text  eos  bos  eos  bos  text
            #   position              0    1          0    1    2    3
            last_text = np.maximum.accumulate(np.where(begins, -1, places), 1)
            run_positions = places - last_text - 1
            # The run at the beginning of a block may begin with the eos of the document before it, but it ends with a
            # bos. So its last position has to become odd, which adding the length of the run does. A block without any
            # text is taken to begin with a bos.
            first_run_length = np.where(begins.all(1), 1, begins.argmin(1))[:, None]
            run_positions += np.where(last_text < 0, first_run_length, 0)
            begins &= run_positions % 2 == 1
        else:
            begins[:, 1:] &= ids[:, :-1] == self.eos
        begins[:, 0] = True
        # The distance to the latest beginning.
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), 1)
        batch = {"input_ids": ids, "position_ids": positions, "labels": np.where(begins, IGNORED, ids)}
        return {name: torch.from_numpy(values) for name, values in batch.items()}
