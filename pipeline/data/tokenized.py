"""Tokens of conversations, pairs and prompts, a thousand rows at a time; TRL's trainers go through them one by one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from pipeline.data.columns import Kind, Split
from pipeline.data.packing import IGNORED
from pipeline.errors import Problem, UserError

logger = logging.getLogger(__name__)

PROMPTS_MEASURED = 100
"""Prompts that are counted in any case; those of a stream are read over the network."""


def drop_long_prompts(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    positions: int | None,
    template: Mapping[str, Any] | None = None,
) -> Split:
    """Leave out prompts that leave no room for an answer; their number is logged.

    Args:
        split: Rows with the column `prompt`.
        tokenizer: A tokenizer with a chat template.
        length: Tokens of the longest answer, `max_completion_length`.
        positions: `max_position_embeddings` of the model, if it has any.
        template: Further arguments of the chat template, `chat_template_kwargs`.

    Raises:
        UserError: If no prompt leaves room; of a stream, none of the first.
        ValueError: If the chat template makes no tokens of a prompt.
    """
    options = dict(template or {})

    def count(prompts: list[Any]) -> list[int]:
        encoded = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **options
        )
        return [len(ids) for ids in encoded["input_ids"]]

    measured = count([row["prompt"] for row in split.take(PROMPTS_MEASURED)])
    if not min(measured):
        raise ValueError("it makes no tokens of it")
    if positions is None:
        return split
    room = positions - length
    if not isinstance(split, Dataset):
        _check_shortest(measured, length, positions)
        return split.filter(
            lambda prompts: [size <= room for size in count(prompts)], batched=True, input_columns="prompt"
        )
    sizes = [size for batch in split.select_columns("prompt").iter(1000) for size in count(batch["prompt"])]
    kept = [number for number, size in enumerate(sizes) if size <= room]
    if len(kept) == len(split):
        return split
    _check_shortest(sizes, length, positions)
    logger.warning(
        "%d of %d prompts have more than %d tokens, which leaves no room for an answer, and are left out.",
        *(len(split) - len(kept), len(split), room),
    )
    return split.select(kept)


def _check_shortest(sizes: Sequence[int], length: int, positions: int) -> None:
    """Refuse prompts none of which leaves room for an answer."""
    if min(sizes) > positions - length:
        remedy = (
            f"every prompt takes {min(sizes)} tokens or more of the model's context of {positions} "
            f"(max_position_embeddings), which leaves {max(0, positions - min(sizes))}; lower it or shorten prompts"
        )
        raise UserError(Problem("max_completion_length", length, remedy))


def template_for_labels(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template with `{% generation %}` around what the assistant says: the tokenizer's own or TRL's.

    None if the tokenizer's has no such marks, and TRL has none with them for it.
    """
    if has_generation_markers(own := tokenizer.get_chat_template()):
        return own
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def add_tokens(
    split: Split,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    answers_only: bool = False,
    num_proc: int | None = None,
) -> Split:
    """Add the columns that TRL's trainers otherwise make of conversations and of pairs; streams are left to them.

    A stream gets them here if only the answers are labels and TRL cannot find them: see `template_for_labels`.

    Args:
        split: Rows with the columns of `kind`, which are kept.
        kind: "conversation" and "preference" have tokens; rows of other kinds are returned as they are.
        tokenizer: A tokenizer with a chat template.
        answers_only: Whether only the assistant's tokens are labels of a conversation.
        num_proc: Processes, unless the split is a stream. Default: this one.

    Raises:
        UserError: If the assistant's tokens of a conversation cannot be found.
    """
    template = template_for_labels(tokenizer) if answers_only else None

    def encode(conversations: list[Any], **options: Any) -> dict[str, list[list[int]]]:
        return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)

    def conversations(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        if not answers_only:
            ids = encode(batch["messages"])["input_ids"]
            return {"input_ids": ids, "labels": ids}
        if template is None:
            return _label_by_prefixes(batch["messages"], tokenizer)
        encoded = encode(batch["messages"], chat_template=template, return_assistant_tokens_mask=True)
        masks = encoded["assistant_masks"]
        if not all(map(any, masks)):
            remedy = "the chat template marks no token of a conversation as the assistant's; correct {% generation %}"
            raise UserError(Problem("assistant_only_loss", True, remedy))
        labels = [
            [token if kept else IGNORED for token, kept in zip(row, mask, strict=True)]
            for row, mask in zip(encoded["input_ids"], masks, strict=True)
        ]
        return {"input_ids": encoded["input_ids"], "labels": labels}

    def pairs(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        def tokens(side: str) -> list[list[int]]:
            rows = zip(batch["prompt"], batch[side], strict=True)
            return encode([prompt + answer for prompt, answer in rows])["input_ids"]

        return {f"{side}_ids": tokens(side) for side in ("chosen", "rejected")}

    function = {"conversation": conversations, "preference": pairs}.get(kind)
    if function and isinstance(split, Dataset):
        return split.map(function, batched=True, num_proc=num_proc)
    return split.map(function, batched=True) if function and answers_only and template is None else split


def _label_by_prefixes(
    rows: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Return tokens and labels of conversations under a chat template without marks around what the assistant says.

    An answer begins where the turns before it end, followed by the generation prompt, and it ends with the eos token.
    """
    turns = [(row, end) for row, messages in enumerate(rows) for end in _answers(messages)]
    texts = [rows[row][:end] for row, end in turns]

    def encode(conversations: Sequence[Any], prompt: bool = False) -> list[list[int]]:
        return tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=prompt, tokenize=True, return_dict=True
        )["input_ids"]

    ids = encode(rows)
    labels = [[IGNORED] * len(row) for row in ids]
    for (row, _), before, whole in zip(turns, encode([t[:-1] for t in texts], True), encode(texts), strict=True):
        answer = whole[len(before) :]
        if tokenizer.eos_token_id not in answer or ids[row][: len(whole)] != whole or whole[: len(before)] != before:
            remedy = (
                "the answers in a conversation cannot be found by the chat template, which neither marks them with "
                f"{{% generation %}} nor ends each with the eos token ({tokenizer.eos_token}) without a change to the "
                "turns before it; give a template that does (chat_template_path), or the right eos_token"
            )
            raise UserError(Problem("assistant_only_loss", True, remedy))
        end = len(whole) - answer[::-1].index(tokenizer.eos_token_id)
        labels[row][len(before) : end] = whole[len(before) : end]
    return {"input_ids": ids, "labels": labels}


def _answers(messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the numbers of messages up to and including each answer of the assistant."""
    return [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
