"""Tokens of conversations and of pairs, a thousand rows at a time; TRL's trainers go through them one by one."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pipeline.data.columns import Kind, Split
from pipeline.data.packing import IGNORED
from pipeline.errors import Problem, UserError


def add_tokens(split: Split, kind: Kind, tokenizer: PreTrainedTokenizerBase, answers_only: bool = False) -> Split:
    """Add the columns that TRL's trainers otherwise make of conversations and of pairs; streams are left to them.

    Args:
        split: Rows with the columns of `kind`, which are kept.
        kind: "conversation" and "preference" have tokens; rows of other kinds are returned as they are.
        tokenizer: A tokenizer with a chat template.
        answers_only: Whether only the assistant's tokens are labels of a conversation.

    Raises:
        UserError: If the chat template marks none of a conversation's tokens as the assistant's.
    """

    def encode(conversations: list[Any], **options: bool) -> dict[str, list[list[int]]]:
        return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)

    def conversations(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encoded = encode(batch["messages"], return_assistant_tokens_mask=answers_only)
        ids = encoded["input_ids"]
        if not answers_only:
            return {"input_ids": ids, "labels": ids}
        masks = encoded["assistant_masks"]
        if not all(map(any, masks)):
            remedy = "the chat template marks no token of a conversation as the assistant's; correct {% generation %}"
            raise UserError(Problem("assistant_only_loss", True, remedy))
        labels = [
            [token if kept else IGNORED for token, kept in zip(row, mask, strict=True)]
            for row, mask in zip(ids, masks, strict=True)
        ]
        return {"input_ids": ids, "labels": labels}

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        def tokens(side: str) -> list[list[int]]:
            rows = zip(batch["prompt"], batch[side], strict=True)
            return encode([prompt + answer for prompt, answer in rows])["input_ids"]

        return {f"{side}_ids": tokens(side) for side in ("chosen", "rejected")}

    function = {"conversation": conversations, "preference": pairs}.get(kind)
    return split.map(function, batched=True) if function and isinstance(split, Dataset) else split
