"""Batches of packed conversations with padded rows, where TRL would put everything into one long row.

TRL flattens a packed batch, as FlashAttention expects it. Other attention computes the whole square of that sequence
and then masks most of it, which takes 1.7 times as long on a CPU. Two rows, each with two conversations:

    TRL       a a a b b c c c c d        one row: attention computes 10 x 10 scores
    here      a a a b b                  two rows: 2 x 5 x 5 scores
              c c c c d
    position  0 1 2 0 1 / 0 1 2 3 0      restarts at each conversation, so that none sees another
"""

from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class PackedRows(DataCollatorForLanguageModeling):
    """TRL's collator, with `return_position_ids=True`, for rows that consist of several conversations."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows, with the lengths of their conversations in `seq_lengths`, into tensors (batch, longest row)."""
        batch: dict[str, Any] = super().torch_call(examples)
        # Without a mask, transformers separates sequences by their positions. Padding is its own sequence.
        del batch["attention_mask"]
        # The first token of a conversation has no context to be predicted from.
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch
