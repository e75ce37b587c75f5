"""Tokens of conversations, pairs and prompts, a thousand rows at a time, where TRL's trainers take one by one."""

import json
from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from pipeline.data.columns import TOKENS, Kind, Split, column_names
from pipeline.data.messages import Messages
from pipeline.data.packing import IGNORED
from pipeline.errors import Problem, UserError
from pipeline.progress import report_lost

ANSWERS = {"chosen", "rejected", "completion"}
"""Columns with answers to a prompt."""


def drop_long_prompts(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    positions: int | None,
    template: Mapping[str, Any] | None = None,
    added: int = 0,
) -> Split:
    """Drop prompts that leave no room for an answer of `length` tokens; their number is logged.

    `positions` is the model's `max_position_embeddings`, if any; `template` has the `chat_template_kwargs`; `added` is
    the number of tokens that tools add to a prompt. Raise a `UserError` if no prompt leaves room (of a stream, none of
    the first), and a `ValueError` if the chat template makes no tokens from a prompt.
    """

    def count(prompts: list[Any]) -> list[int]:
        return list(map(len, _encode(tokenizer, prompts, add_generation_prompt=True, **(template or {}))["input_ids"]))

    # Only the first prompts are counted here, because those of a stream may have to be downloaded.
    first = count([row["prompt"] for row in split.take(100)])
    if not min(first):
        raise ValueError("it makes no tokens from a prompt")
    if positions is None:
        return split

    room = positions - length - added
    kept = split.filter(lambda prompts: [size <= room for size in count(prompts)], batched=True, input_columns="prompt")
    if not len(kept) if isinstance(kept, Dataset) else min(first) > room:
        remedy = f"every prompt takes more than the {max(0, room)} tokens that it leaves of the model's context of "
        remedy += f"{positions} (max_position_embeddings); lower it or shorten prompts"
        raise UserError(Problem("max_completion_length", length, remedy))
    if not isinstance(split, Dataset) and (lost := sum(size > room for size in first)):
        what = f"checked prompts have more than {room} tokens, which leaves no room for an answer; such are dropped"
        report_lost(lost, len(first), what, "lower max_completion_length, or shorten them")
    if isinstance(split, Dataset) and len(kept) < len(split):
        what = f"prompts have more than {room} tokens, which leaves no room for an answer, and are dropped"
        report_lost(len(split) - len(kept), len(split), what, "lower max_completion_length, or shorten them")
    return kept


def drop_long_pairs(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, of: str = "") -> Split:
    """Drop rows with an answer that has more than `max_length` tokens together with its prompt; report their number.

    A row is a pair of answers, or a single one; `of` is a word before that, such as "evaluation ". Nothing is reported
    for a stream. Raise a `UserError` if no row is left.
    """
    answers = sorted(ANSWERS.intersection(column_names(split)))

    def count(prompts: list[Any], *sides: list[Any]) -> list[int]:
        texts = [list(map(add, prompts, side)) for side in sides]
        sizes = [list(map(len, _encode(tokenizer, side)["input_ids"])) for side in texts]
        return list(map(max, zip(*sizes, strict=True)))

    if not isinstance(split, Dataset):
        columns = ["prompt", *answers]
        return split.filter(
            lambda *batch: [size <= max_length for size in count(*batch)], input_columns=columns, batched=True
        )
    lengths: list[int] = []
    for batch in split.select_columns(["prompt", *answers]).iter(1000):
        lengths += count(batch["prompt"], *(batch[answer] for answer in answers))
    report_long_pairs(lengths, max_length, of + ("pairs" if "chosen" in answers else "answers"))
    if max(lengths) <= max_length:
        return split
    return split.select([row for row, length in enumerate(lengths) if length <= max_length])


def pair_lengths(pairs: Dataset) -> list[int]:
    """Return the number of tokens of the longer side of each pair that `add_tokens` has encoded."""
    batches = pairs.select_columns(["chosen_ids", "rejected_ids"]).iter(1000)
    sides = ((batch["chosen_ids"], batch["rejected_ids"]) for batch in batches)
    return [max(map(len, pair)) for batch in sides for pair in zip(*batch, strict=True)]


def report_long_pairs(lengths: Sequence[int], max_length: int, what: str) -> None:
    """Report how many of the rows with these `lengths` are too long, and so dropped; `what` names them.

    Raise a `UserError` if all of them are.
    """
    if min(lengths) > max_length:
        remedy = f"every pair is longer ({min(lengths)} tokens at least) and would be dropped; raise it"
        raise UserError(Problem("max_length", max_length, remedy))
    if longer := sum(length > max_length for length in lengths):
        limit = f"max_length {max_length} (up to {max(lengths)} tokens)"
        report_lost(longer, len(lengths), f"{what} are longer than {limit} and are dropped", "raise it")


def log_truncated(dataset: Split, args: SFTConfig) -> None:
    """Log how many tokenized conversations exceed `max_length`, and so lose their end (beginning, with `keep_end`).

    Nothing is logged for a stream, whose rows are tokenized later, or if packing continues them in the next sequence.
    """
    goes_on = args.packing and args.packing_strategy != "bfd"
    if not isinstance(dataset, Dataset) or TOKENS not in dataset.column_names or args.max_length is None or goes_on:
        return
    lengths = [len(ids) for batch in dataset.select_columns(TOKENS).iter(1000) for ids in batch[TOKENS]]
    end = "beginning" if args.truncation_mode == "keep_end" and not args.packing else "end"
    if longer := sum(length > args.max_length for length in lengths):
        what = f"conversations are longer than max_length {args.max_length} (up to {max(lengths)} tokens) and lose "
        remedy = "raise it, or the model does not learn to stop after long answers"
        report_lost(longer, len(lengths), f"{what}their {end}", remedy)
    if "labels" not in dataset.column_names or end != "end":
        return
    # A prompt alone may fill the sequence. With `keep_end`, it is the prompt that is cut off.
    unlabelled = 0
    for batch in dataset.select_columns("labels").iter(1000):
        unlabelled += sum(all(label == IGNORED for label in row[: args.max_length]) for row in batch["labels"])
    if unlabelled:
        what = (
            f"conversations have a prompt that fills max_length {args.max_length}, so that nothing is learned from them"
        )
        report_lost(unlabelled, len(lengths), what, "raise it, or shorten the prompts")


def template_for_labels(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template with `{% generation %}` around answers, the tokenizer's own or TRL's, if any."""
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
    """Add the columns that TRL's trainers would otherwise make from conversations and pairs; streams are left to them.

    A stream gets them here only if just the answers are labels and TRL cannot find them: see `template_for_labels`.

    With `answers_only`, only the assistant's tokens are labels of a conversation. `num_proc` is the number of
    processes, unless the split is a stream. Raise a `UserError` if the assistant's tokens cannot be found.
    """
    template = template_for_labels(tokenizer) if answers_only else None
    # Each row has its own tools, and a template takes the tools of a single conversation.
    size = 1 if kind == "conversation" and "tools" in column_names(split) else 1000

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        if kind == "preference":
            sides = {side: list(map(add, batch["prompt"], batch[side])) for side in ("chosen", "rejected")}
            return {f"{side}_ids": _encode(tokenizer, rows)["input_ids"] for side, rows in sides.items()}
        # In a stream, the rows of a data set without tools do not have the column either.
        tools = {"tools": json.loads(batch.get("tools", [None])[0] or "null")} if size == 1 else {}
        if not answers_only:
            ids = _encode(tokenizer, batch["messages"], **tools)["input_ids"]
            return {"input_ids": ids, "labels": ids}
        if template is None:
            return _label_by_prefixes(batch["messages"], tokenizer, **tools)
        options = {"chat_template": template, "return_assistant_tokens_mask": True, **tools}
        encoded = _encode(tokenizer, batch["messages"], **options)
        labels = []
        for row, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
            if not any(mask):
                remedy = "the chat template does not mark any token of a conversation as the assistant's"
                raise UserError(Problem("assistant_only_loss", True, f"{remedy}; correct {{% generation %}}"))
            labels.append([token if kept else IGNORED for token, kept in zip(row, mask, strict=True)])
        return {"input_ids": encoded["input_ids"], "labels": labels}

    if kind in ("conversation", "preference") and isinstance(split, Dataset):
        return split.map(convert, batched=True, batch_size=size, num_proc=num_proc)
    is_left = kind != "conversation" or not answers_only or template is not None
    return split if is_left else split.map(convert, batched=True, batch_size=size)


def _encode(tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **options: Any) -> dict[str, list[list[int]]]:
    return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)


def _label_by_prefixes(rows: list[Messages], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Return tokens and labels of conversations under a chat template without marks around what the assistant says."""
    # An answer begins where the turns before it end, followed by the generation prompt, and ends with the eos token.
    # One text per answer: the conversation up to and including it, and the number of its row.
    turns = ((number, end, turn) for number, messages in enumerate(rows) for end, turn in enumerate(messages, start=1))
    ends = [(number, end) for number, end, turn in turns if turn["role"] == "assistant"]
    texts = [rows[number][:end] for number, end in ends]
    ids, wholes = (_encode(tokenizer, some, **options)["input_ids"] for some in (rows, texts))
    befores = _encode(tokenizer, [text[:-1] for text in texts], add_generation_prompt=True, **options)["input_ids"]
    labels = [[IGNORED] * len(row) for row in ids]
    for (number, _), before, whole in zip(ends, befores, wholes, strict=True):
        answer = whole[len(before) :]
        is_prefix = ids[number][: len(whole)] == whole and whole[: len(before)] == before
        if not is_prefix or tokenizer.eos_token_id not in answer:
            remedy = "the answers cannot be found by the chat template, which neither marks them with {% generation %} "
            remedy += f"nor ends each with the eos token ({tokenizer.eos_token}) without a change to the turns before; "
            remedy += "give a template that does (chat_template_path), or the right eos_token"
            raise UserError(Problem("assistant_only_loss", True, remedy))
        # Up to the last eos token: what the template writes after it, such as a line break, does not get a label.
        end = len(whole) - answer[::-1].index(tokenizer.eos_token_id)
        labels[number][len(before) : end] = whole[len(before) : end]
    return {"input_ids": ids, "labels": labels}
